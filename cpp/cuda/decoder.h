// One decoder's forward pass on a GPU: the same model, tokens and logits as model/decoder.h, with weights, keys and
// values in device memory. A decoded token is one CUDA graph: masks are made and used on the device, the host only sets
// the token and fetches the logits. Where the model does not fit, the CPU computes some of the FFNs' neurons
// (cuda/split.h), and the step is a chain of graphs between which the two exchange vectors.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/memory.h"
#include "cuda/upload.h"
#include "kernels/cuda/launch.h"
#include "model/decoder.h"
#include "model/ffn_rest.h"

namespace sr {
namespace cuda {

struct DeviceLayer;
struct DevicePlan;

// Device memory that a model and its contexts share.
class DeviceRoom {
 public:
  DeviceRoom(size_t budget, size_t used) : left_(int64_t(budget) - int64_t(used)) {}
  // Throws Error(budget) where so many bytes are not left for a context of n_ctx tokens.
  void take(size_t bytes, int n_ctx);
  void give_back(size_t bytes) { left_ += int64_t(bytes); }

 private:
  std::atomic<int64_t> left_;
};

// Keys and values of one session: [layer, key head, position, dimension], fp16; and the logits of its last decoded
// token.
class DeviceKv {
 public:
  DeviceKv(const DecoderConfig& config, int n_ctx, std::shared_ptr<DeviceRoom> room = nullptr);
  ~DeviceKv();
  static size_t device_bytes(const DecoderConfig& config, int n_ctx);
  int n_ctx() const { return n_ctx_; }
  size_t bytes(int n) const { return size_t(n) * bytes_per_position_; }
  AttendView view(const DecoderConfig& config, int layer) const;

 private:
  friend class DeviceDecoder;
  int n_ctx_;
  size_t layer_entries_ = 0, bytes_per_position_ = 0;
  DeviceBuffer<uint16_t> k_, v_;
  DeviceBuffer<float> logits_;
  std::shared_ptr<DeviceRoom> room_;
  size_t taken_ = 0;
  // The captured decode step in pieces, and what it was captured for.
  struct Piece {
    cudaGraphExec_t graph;
    bool marked;  // what the CPU computes from is there when it has run
    int rest;     // layer whose rest the CPU computes before the next piece; -1: none
  };
  std::vector<Piece> pieces_;
  uint64_t plan_ = 0;
  void drop_pieces();
};

class DeviceDecoder {
 public:
  // Throws Error(unsupported) for what the device path lacks, Error(budget) where the device has no room for the
  // weights.
  explicit DeviceDecoder(const PackedModel& model, const DeviceOptions& options = {});
  ~DeviceDecoder();

  const DecoderConfig& config() const { return config_; }
  const std::string& device_name() const { return name_; }
  size_t bytes_per_token() const { return weights_.bytes_per_token; }
  size_t device_bytes() const { return device_bytes_; }  // of weights there
  DeviceStats stats() const {
    return {budget_, floor_, device_bytes_, rest_ ? rest_->bytes() : 0, rest_layers_, hot_share_};
  }
  const std::shared_ptr<DeviceRoom>& room() const { return room_; }
  int position_limit() const { return weights_.n_positions; }
  int padded_vocab() const { return weights_.head().padded_rows(); }

  // As Decoder::forward. In a block of tokens the stop is asked for as layers are put on the stream. best: of one
  // token, the most likely next one, the lowest id on ties; logits may then be null and stay on the device, for
  // `logits` to fetch.
  bool forward(const int32_t* tokens, int n, int pos, DeviceKv* cache, Logits which, float* logits,
               const std::function<bool()>& should_stop, const Skipping& skipping = {}, int32_t* best = nullptr);
  // [n_vocab] of the token that was decoded last with this cache.
  void logits(const DeviceKv& cache, float* out);
  // The likeliest of them; n is -1 where they are not known.
  void top(const DeviceKv& cache, Top* out);

 private:
  // What one pass works on. With `masks` null nothing is masked.
  struct Pass {
    int n, pos;
    DeviceKv* cache;
    const DevicePlan* masks;
    bool decode;  // one token: exact zeros are skipped too, lists are used
    bool capture = false;  // nothing runs: the step is put down in the cache's pieces
  };
  // Outputs, to whole tiles, of the widest matrices of each kind.
  struct Widths {
    size_t qkv = 0, branch = 0, ffn = 0, vocab = 0;
    int groups = 1;
  };

  const float* upload(const float* vector, size_t n);
  NormView norm(const Norm& n, size_t width);
  Widths widths() const;
  // Calls fn(buffer, elements) for all working memory on the device.
  template <class Fn>
  void for_buffers(const Widths& widths, Fn fn);
  // Which units of every layer's FFN fit; throws Error(budget) where the rest of the model does not.
  std::vector<std::vector<int>> divide(const PackedModel& model, const DeviceOptions& options);
  void load(const std::vector<std::vector<int>>& hot, int threads);
  void load_ffn(int layer, const std::vector<int>& hot, DeviceLayer* d);
  void make_buffers();
  int attend_splits(int n, int n_ctx) const;
  DevicePlan* plan_for(const Skipping& skipping);
  void divide_thresholds(int layer, Site site, std::vector<float>* all, DevicePlan* plan) const;
  bool planned(const Skipping& skipping, int pos, bool decode) const;
  Mask mask(const Pass& p, int layer, Site site) const;

  void product(const Pass& p, const DeviceMatrix& w, const Vectors& x, const Mask& m, float* y, size_t ldy);
  void begin(const Pass& p);
  void attention(const Pass& p, int index, bool keys_only);
  void norm_inside(const Pass& p, const NormView& norm, const Vectors& v, bool quantise, const Mask& mask);
  void ffn(const Pass& p, int index);
  void ffn_on_device(const Pass& p, int index, const Mask& masked);
  // The end of a piece of the step, after which the CPU computes a layer's rest (rest >= 0). marked: what it computes
  // from is on the way to the host.
  void cut(const Pass& p, bool marked, int rest);
  void compute_rest(const Pass& p, int index);
  void neurons(const Pass& p, int index);
  bool all_layers(const Pass& p, Logits which, const std::function<bool()>& should_stop);
  void head(const Pass& p, int row, int rows);
  void put_step(const Pass& p);
  void capture_step(Pass p);
  void end_piece(DeviceKv* cache, bool marked, int rest);
  void decode_step(const Pass& p, int token, float* logits);
  bool block(const Pass& p, const int32_t* tokens, Logits which, float* logits,
             const std::function<bool()>& should_stop);
  void report(const Skipping& skipping, int n, int pos) const;

  DecoderConfig config_;
  DecoderWeights weights_;  // views of the file: shapes, and what the host counts by
  std::string name_;
  int multiprocessors_ = 1;
  size_t device_bytes_ = 0, budget_ = 0, floor_ = 0;
  std::shared_ptr<DeviceRoom> room_;
  std::unique_ptr<FfnRest> rest_;  // null: all is on the device
  int rest_layers_ = 0;
  double hot_share_ = 1;  // of all neurons
  bool true_zeros_ = false;  // the activation gives exact zeros
  bool graphs_ = true;       // decoded tokens are graphs
  bool overlap_ = false;     // a graph's kernels may start before the one before is over
  bool loaded_ = false;      // a token has been decoded
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
  // [n_layers, kSites] columns (neurons) kept, then: logits not finite, length of ids_, the most likely token.
  DeviceBuffer<int> kept_;
  DeviceBuffer<float> x_, qkv_, branch_o_, branch_down_, gate_up_, rope_table_[2], partial_, logits_;
  DeviceBuffer<float> attend_partial_, attend_max_, attend_sum_, best_scratch_;
  DeviceBuffer<TopScratch> top_scratch_;
  DeviceBuffer<Top> top_;
  DeviceVectors in_, att_, ffn_in_, z_, head_in_;
  size_t ld_qkv_ = 0, ld_branch_ = 0, ld_gate_up_ = 0;
  Branch pending_[2];  // what the next layer adds to the stream first

  std::vector<std::unique_ptr<DevicePlan>> plans_;
  uint64_t last_plan_ = 0;
  // What the host and the device tell each other.
  PinnedBuffer<Step> host_step_;
  PinnedBuffer<int> host_tokens_, host_kept_;
  PinnedBuffer<float> host_logits_, host_x_, host_rest_;
  PinnedBuffer<Top> host_top_;
  Event host_x_there_;
  std::vector<int> rest_kept_;  // [n_layers, kSites] of the CPU's neurons
};

}  // namespace cuda
}  // namespace sr
