// What cuda/decoder.cc and cuda/pass.cc share: one layer on the device, and a plan's thresholds there.
#pragma once

#include "cuda/decoder.h"

namespace sr {
namespace cuda {

constexpr int kHeadRows = 32;  // tokens whose logits are computed at a time

struct DeviceLayer {
  NormView attn_norm, ffn_norm, post_attn_norm, post_ffn_norm, q_norm, k_norm, attn_sub_norm, ffn_sub_norm;
  DeviceMatrix qkv, o, ffn_in, down;
  DeviceNeurons ffn_rows;  // instead of ffn_in
  int neurons = 0;         // of the FFN that are here
  std::vector<int> units;  // which, where they are not all
  DeviceBuffer<int> head_at;
};

struct DevicePlan {
  uint64_t serial = 0, id = 0;
  bool exact = true, mask_blocks = false;
  int dense_tokens = 0;
  float break_even = 0.85f;  // of exact zeros alone, as on the CPU
  std::vector<DeviceBuffer<float>> thresholds;  // [layers, kSites]; of the neurons on the device at Z and G
  // Of layers of which the CPU has a part, its thresholds.
  struct Rest {
    std::vector<float> in, gate, z;
  };
  std::vector<Rest> rest;  // [layers], empty where the device has all
};

}  // namespace cuda
}  // namespace sr
