// One decoder's forward pass on a GPU: the same model, tokens and logits as model/decoder.h, with weights, keys and values
// in device memory. A decoded token is one CUDA graph: masks are made and used on the device, the host only sets the token
// and fetches the logits.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/memory.h"
#include "cuda/upload.h"
#include "kernels/cuda/launch.h"
#include "model/decoder.h"

namespace sr {
namespace cuda {

struct DeviceLayer;
struct DevicePlan;

// Keys and values of one session: [layer, key head, position, dimension], fp16.
class DeviceKv {
 public:
  DeviceKv(const DecoderConfig& config, int n_ctx);
  ~DeviceKv();
  int n_ctx() const { return n_ctx_; }
  size_t bytes(int n) const { return size_t(n) * bytes_per_position_; }
  AttendView view(const DecoderConfig& config, int layer) const;

 private:
  friend class DeviceDecoder;
  int n_ctx_;
  size_t layer_entries_ = 0, bytes_per_position_ = 0;
  DeviceBuffer<uint16_t> k_, v_;
  // The captured decode step, and what it was captured for.
  cudaGraphExec_t graph_ = nullptr;
  uint64_t graph_plan_ = 0;
  void drop_graph();
};

class DeviceDecoder {
 public:
  // Throws Error(unsupported) for what the device path lacks, Error(budget) where the device has no room for the weights.
  explicit DeviceDecoder(const PackedModel& model);
  ~DeviceDecoder();

  const DecoderConfig& config() const { return config_; }
  const std::string& device_name() const { return name_; }
  size_t bytes_per_token() const { return weights_.bytes_per_token; }
  size_t device_bytes() const { return device_bytes_; }
  int position_limit() const { return weights_.n_positions; }
  int padded_vocab() const { return weights_.head().padded_rows(); }

  // As Decoder::forward. In a block of tokens the stop is asked for as layers are put on the stream.
  bool forward(const int32_t* tokens, int n, int pos, DeviceKv* cache, Logits which, float* logits,
               const std::function<bool()>& should_stop, const Skipping& skipping = {});

 private:
  // What one pass works on. With `masks` null nothing is masked.
  struct Pass {
    int n;
    DeviceKv* cache;
    const DevicePlan* masks;
    bool decode;  // one token: exact zeros are skipped too, lists are used
  };

  const float* upload(const float* vector, size_t n);
  NormView norm(const Norm& n, size_t width);
  void load(const PackedModel& model);
  void make_buffers();
  int attend_splits(int n, int n_ctx) const;
  DevicePlan* plan_for(const Skipping& skipping);
  bool planned(const Skipping& skipping, int pos, bool decode) const;
  Mask mask(const Pass& p, int layer, Site site) const;

  void product(const Pass& p, const DeviceMatrix& w, const Vectors& x, const Mask& m, float* y, size_t ldy);
  void begin(const Pass& p);
  void attention(const Pass& p, int index, bool keys_only);
  void ffn(const Pass& p, int index);
  void neurons(const Pass& p, int index);
  bool all_layers(const Pass& p, Logits which, const std::function<bool()>& should_stop);
  void head(const Pass& p, int row, int rows);
  void decode_step(const Pass& p, int token, int pos, float* logits);
  bool block(const Pass& p, const int32_t* tokens, int pos, Logits which, float* logits,
             const std::function<bool()>& should_stop);
  void report(const Skipping& skipping, int n, int pos) const;

  DecoderConfig config_;
  DecoderWeights weights_;  // views of the file: shapes, and what the host counts by
  std::string name_;
  int multiprocessors_ = 1;
  size_t device_bytes_ = 0;
  bool true_zeros_ = false;  // the activation gives exact zeros
  std::mutex turn_;
  Stream stream_;

  std::vector<DeviceBuffer<float>> vectors_;
  std::vector<std::unique_ptr<DeviceLayer>> layers_;
  DeviceMatrix embd_, output_;
  NormView output_norm_ = {};
  const float* position_embd_ = nullptr;
  DeviceBuffer<double> frequency_[4];  // of global and of windowed layers; the same for long contexts
  DeviceBuffer<float> zeros_;          // [widest site]: a threshold that drops only what is exactly 0

  // Working memory of a pass, for up to kMaxBlock tokens.
  DeviceBuffer<Step> step_;
  DeviceBuffer<int> tokens_, tickets_, ids_;
  DeviceBuffer<int> kept_;  // [n_layers, kSites] columns (neurons) kept, then: logits not finite, length of ids_
  DeviceBuffer<float> x_, qkv_, branch_o_, branch_down_, gate_up_, rope_table_[2], partial_, logits_;
  DeviceBuffer<float> attend_partial_, attend_max_, attend_sum_;
  DeviceVectors in_, att_, ffn_in_, z_, head_in_;
  size_t ld_qkv_ = 0, ld_branch_ = 0, ld_gate_up_ = 0;
  Branch pending_[2];  // what the next layer adds to the stream first

  std::vector<std::unique_ptr<DevicePlan>> plans_;
  uint64_t last_plan_ = 0;
  // What the host and the device tell each other.
  PinnedBuffer<Step> host_step_;
  PinnedBuffer<int> host_tokens_, host_kept_;
  PinnedBuffer<float> host_logits_;
};

}  // namespace cuda
}  // namespace sr
