// /proc/meminfo and the cgroup files on Linux; half of physical memory elsewhere.
#include "base/memory_info.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__APPLE__)
#include <mach/mach.h>
#endif

namespace sr {
namespace {

#if defined(__linux__)
// The number in a one-line file, or -1 ("max", missing, unreadable).
double number_in(const std::string& path) {
  std::ifstream in(path);
  double value = -1;
  return in >> value ? value : -1;
}

// Room below the limit of one cgroup directory: limit - usage + file cache (which gives way).
double room_in(const std::string& dir, const char* limit, const char* usage, const char* cache_key) {
  const double most = number_in(dir + limit), used = number_in(dir + usage);
  if (most < 0 || used < 0) return -1;
  double cache = 0;
  std::ifstream stat(dir + "/memory.stat");
  for (std::string key; stat >> key;) {
    double value = 0;
    stat >> value;
    if (key == cache_key) cache += value;
  }
  return std::max(0.0, most - used + cache);
}

// The smallest room, or the smallest limit, on the way from this process's memory cgroup to the root, v1 or v2; -1 for
// no limit.
double cgroup_least(bool limits) {
  double best = -1;
  std::ifstream in("/proc/self/cgroup");
  for (std::string line; std::getline(in, line);) {
    const size_t a = line.find(':'), b = line.find(':', a + 1);
    if (a == std::string::npos || b == std::string::npos) continue;
    const std::string controllers = line.substr(a + 1, b - a - 1);
    const bool v2 = controllers.empty();
    if (!v2 && ("," + controllers + ",").find(",memory,") == std::string::npos) continue;
    const std::string root = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    const char* limit = v2 ? "/memory.max" : "/memory.limit_in_bytes";
    for (std::string path = line.substr(b + 1);; path.erase(path.rfind('/'))) {
      const std::string dir = root + (path == "/" ? "" : path);
      const double bytes = limits ? number_in(dir + limit)
                           : v2   ? room_in(dir, limit, "/memory.current", "inactive_file")
                                  : room_in(dir, limit, "/memory.usage_in_bytes", "total_inactive_file");
      if (bytes >= 0 && (best < 0 || bytes < best)) best = bytes;
      if (path.empty() || path == "/") break;
    }
  }
  return best;
}

// A line of /proc/meminfo in bytes, or 0.
double meminfo(const std::string& key) {
  std::ifstream in("/proc/meminfo");
  for (std::string line; std::getline(in, line);) {
    if (line.rfind(key, 0) == 0) return 1024.0 * std::stod(line.substr(key.size()));
  }
  return 0;
}
#endif

size_t to_size(double bytes) { return bytes > double(SIZE_MAX) / 2 ? SIZE_MAX / 2 : size_t(bytes); }

}  // namespace

size_t available_memory() {
  double bytes = 0;
#if defined(__linux__)
  bytes = meminfo("MemAvailable:");
  const double room = cgroup_least(false);
  if (room >= 0 && (bytes == 0 || room < bytes)) bytes = room;
#elif defined(_SC_PHYS_PAGES)
  bytes = 0.5 * double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGESIZE));
#endif
  return to_size(bytes);
}

size_t total_memory() {
  double bytes = 0;
#if defined(__linux__)
  bytes = meminfo("MemTotal:");
  const double limit = cgroup_least(true);
  if (limit >= 0 && (bytes == 0 || limit < bytes)) bytes = limit;
#elif defined(_SC_PHYS_PAGES)
  bytes = double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGESIZE));
#endif
  return to_size(bytes);
}

size_t resident_memory() {
#if defined(__linux__)
  std::ifstream in("/proc/self/statm");
  double pages = 0, resident = 0;
  if (in >> pages >> resident) return to_size(resident * double(sysconf(_SC_PAGESIZE)));
#elif defined(__APPLE__)
  mach_task_basic_info info;
  mach_msg_type_number_t count = MACH_TASK_BASIC_INFO_COUNT;
  if (task_info(mach_task_self(), MACH_TASK_BASIC_INFO, reinterpret_cast<task_info_t>(&info), &count) == KERN_SUCCESS)
    return size_t(info.resident_size);
#endif
  return 0;
}

void give_back_freed_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

}  // namespace sr
