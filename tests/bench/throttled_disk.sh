#!/usr/bin/env bash
# A disk of a known, steady rate, for measuring what is read from flash on a machine whose own disk is shared or too
# fast: an ext4 file system in memory whose reads the block layer holds to RATE bytes a second.
#   throttled_disk.sh up MOUNTPOINT SIZE RATE     throttled_disk.sh up /tmp/disk 2500M 1100000000
#   throttled_disk.sh down MOUNTPOINT
# Needs root, loop devices and the blkio controller of cgroup v1.
set -euo pipefail
usage() { sed -n '4,5s/^#  *//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
limits=/sys/fs/cgroup/blkio/blkio.throttle.read_bps_device
what=$1 at=$2
case $what in
up)
  [ $# = 4 ] || usage
  [ -w $limits ] || { echo "no blkio controller to hold the rate" >&2; exit 125; }
  image=$(mktemp /dev/shm/throttled.XXXXXX)
  truncate -s "$3" "$image"
  mkfs.ext4 -q -F "$image"
  device=$(losetup --find --show "$image")
  rm "$image" # lives as long as the device
  mkdir -p "$at"
  mount "$device" "$at"
  blockdev --setra 16384 "$device" # 8 MiB, as ordinary disks of virtual machines have it
  echo "$(cat "/sys/block/${device#/dev/}/dev") $4" >$limits
  ;;
down)
  device=$(findmnt -n -o SOURCE "$at")
  echo "$(cat "/sys/block/${device#/dev/}/dev") 0" >$limits
  umount "$at"
  losetup -d "$device"
  ;;
*) usage ;;
esac
