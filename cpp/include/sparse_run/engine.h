// The engine as a C++ program sees it: a model, a session that evaluates tokens, a sampler that picks the next one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace sr {

enum class WeightMemory : uint8_t {
  automatic,  // copied where at most half of the available memory is needed for it, else mapped
  mapped,     // shared with the page cache; nothing is read before it is needed
  copied,     // read into huge pages at the start: 15-30% faster decoding
};

struct ModelOptions {
  std::string path;  // directory of a packed model (models/format.md)
  int threads = 0;   // 1..1024; 0 = physical cores that affinity and cgroup allow
  WeightMemory memory = WeightMemory::automatic;
  std::string device = "cpu";  // "cpu", "cuda", or "auto": the GPU where there is one that the model fits
  // Bytes of the GPU's memory that weights, working memory and contexts of n_ctx tokens may take; 0 = what is free less
  // a reserve. Neurons of the FFNs that do not fit are computed by the CPU, and the two results added: not bit-equal to
  // the whole model on the GPU, as sums are added in another order.
  size_t device_memory = 0;
  // Bytes that the whole process may take, 0 = no limit: what of the weights does not fit is read from the file in
  // every pass, past the page cache, with the same results. Includes contexts of n_ctx tokens in all, and extra_bytes.
  size_t memory_budget = 0;
  // Only with a budget or a GPU; 0 = what an eighth of the budget holds, 256..4096 and what the model knows; on a GPU
  // the last of these.
  int n_ctx = 0;
  size_t extra_bytes = 0;  // only with a budget: what the caller will allocate himself
  // Only with a budget: the share of the FFNs' neurons that tokens will need together, where set_neurons or
  // set_predictor will say which. Above 0, as many single neurons as fit stay in memory, and decoding reads no others
  // than are missing (where the model has a file of neurons: sparse-run convert --order). Prompts read the FFNs whole.
  double neuron_share = 0;
  // Only with a budget, where neuron_share is 0: tokens will say by their gates which neurons they need (activations
  // with true zeros, thresholds at site G). Gate rows are held and streamed first, and of the other neurons only those
  // are read that are left and not in memory; from the same file.
  bool by_gate = false;
  size_t aside_bytes = 0;     // and the most that he will set aside while nothing is computed
  // Bytes of weights read of those to read at the start; true stops it with Error(cancelled). From the calling thread.
  std::function<bool(size_t done, size_t total)> progress = nullptr;
};

// What a model opened with a budget does with its memory, in bytes, and what its reads have come to.
struct MemoryStats {
  size_t budget = 0;           // 0: opened without one, and all else is 0 too
  size_t process = 0;          // at the start: program, interpreter, tokenizer, vectors
  size_t working = 0;          // buffers of decoding, what is added by extra_bytes and what is kept free
  size_t contexts = 0;         // keys, values and logits of the tokens that contexts hold now
  size_t floor = 0;            // the smallest budget: contexts of n_ctx tokens, a whole block, no weight resident
  size_t resident = 0;         // weights in memory now; those that contexts and prompts do not leave room for are not
  size_t ring = 0;             // weights that are read ahead
  size_t neurons = 0;          // single neurons, their tables included
  int64_t neuron_slots = 0;    // how many
  size_t gates = 0;            // of `neurons`: gate rows that choose the others
  size_t gates_streamed = 0;   // gate rows that every token reads which works from single neurons
  std::string no_neurons;      // why there are none where they were asked for
  size_t streamed = 0;         // weights that every pass reads; a pass is a token, or a block of a prompt
  int n_ctx = 0;               // tokens that all contexts may hold together
  double disk_rate = 0;        // bytes a second at the start, 0 where too little was read to tell
  bool direct = false;         // past the page cache
  int64_t passes = 0;
  int64_t read_bytes = 0;      // after the start
  int64_t reads = 0;
  int64_t hits = 0;            // pieces that were in memory when they were needed, resident ones not counted
  int64_t misses = 0;          // pieces that had to be waited for
  int64_t neuron_tokens = 0;   // passes that read single neurons
  int64_t neuron_hits = 0;     // neurons that were in memory, or on their way there, when they were asked for
  int64_t neuron_misses = 0;   // neurons that had to be read
  double read_seconds = 0;     // during which the disk was busy
  double wait_seconds = 0;     // during which computing waited for it
  double queue_depth = 0;      // reads in progress while the disk was busy, mean
};

// What a GPU holds of a model, in bytes; all 0 where the CPU runs it.
struct DeviceMemory {
  size_t budget = 0;
  size_t floor = 0;        // the smallest budget: the CPU computes all neurons
  size_t weights = 0;
  size_t cpu_weights = 0;  // of the neurons that did not fit
  int cpu_layers = 0;      // which have some of them
  double hot_share = 1;    // of all neurons, those on the GPU
};

struct SamplerOptions {
  float temperature = 0.8f;     // from 0 on; 0 = the most likely token, lowest id on ties
  int top_k = 40;               // the k most likely tokens; 0 = all
  float top_p = 0.95f;          // 0..1: the smallest set of tokens with this probability together; 1 = all
  float min_p = 0.05f;          // 0..1: tokens at least this likely relative to the most likely one; 0 = all
  float repeat_penalty = 1.0f;  // above 0; 1 = off
  int repeat_last_n = 64;       // accepted tokens that the penalty looks at; 0 = none, -1 = all
  int64_t seed = -1;            // from 0 on; -1 = a random one
};

struct Stats {
  int64_t prompt_tokens = 0;   // evaluated two or more at a time
  double prompt_seconds = 0;
  int64_t decode_tokens = 0;   // evaluated one at a time
  double decode_seconds = 0;   // with sampling, where `step` did it
};

// The likeliest tokens of a vocabulary, the likeliest first and the lower id first among equals, and the sum of
// exp(logit - largest logit) over the whole vocabulary to a relative 1e-9: what a device sends instead of all logits.
struct TopTokens {
  const float* logits;
  const int32_t* ids;
  int n;
  int n_vocab;
  double total;
};

// Repetition penalty, top-k, top-p, min-p, temperature, then a draw: llama.cpp's order and meaning. The same seed and
// logits give the same tokens on every machine.
class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options);  // throws Error(usage) on an impossible value
  ~Sampler();
  Sampler(Sampler&&) noexcept;
  Sampler& operator=(Sampler&&) noexcept;

  int32_t sample(const float* logits, int n_vocab);  // does not accept
  // What sample would give on all logits, where this can be told for sure from the likeliest ones: the same token, and
  // the same state afterwards. Else -1, and nothing has changed. Does not accept.
  int32_t sample_top(const TopTokens& top);
  bool may_sample_top(int n) const;  // whether it is worth asking for the n likeliest
  void accept(int32_t token);                        // counts for the repetition penalty from now on
  bool greedy() const;                               // the most likely token is taken whatever was accepted
  void reset();                                      // forgets accepted tokens and starts the seed's sequence again
  uint64_t seed() const;                             // the one in use

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// A model in memory. Copies share it; sessions keep it alive.
class Model {
 public:
  explicit Model(const ModelOptions& options);  // throws Error(model | unsupported | usage | budget | isa)

  const std::string& config_json() const;
  int threads() const;
  std::string isa() const;
  std::string device() const;      // "cpu", or the name of the GPU that runs the model
  int n_vocab() const;
  int n_ctx_train() const;
  int n_layers() const;
  int n_embd() const;
  size_t weight_bytes() const;     // of all tensors
  size_t bytes_per_token() const;  // that one decoded token reads
  MemoryStats memory() const;
  DeviceMemory device_memory() const;
  // The share of neurons above which all are read in one go: "N", of a list; "G", up rows behind their gates. Not set:
  // by the length of a row. Results do not depend on it. Throws Error(usage).
  void set_break_even(const std::string& site, float break_even);
  // Under a budget: the caller is about to take so many bytes for a while; weights have given way when this returns.
  // With 0 they may come back. for_good: beside that, and for as long as the model lives. Waits for a pass that is
  // running. Throws Error(runtime) when the file cannot be read.
  void set_aside(size_t bytes, bool for_good = false);
  bool copied() const;             // weights lie in huge pages, not in a mapping of the file

 private:
  friend class Session;
  friend class Sparsity;
  friend class Predictor;
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

// Thresholds at the sites A, O, M, Z and G of every layer (cpp/sparse/plan.h), bound to one model.
class Sparsity {
 public:
  // Positions before dense_tokens stay dense. Throws Error(usage).
  Sparsity(const Model& model, int dense_tokens);
  // The density, 0 to 1, above which products of a site run dense; not set: by the matrix's shape. Throws Error(usage).
  void set_break_even(const std::string& site, float break_even);
  // The same as it takes effect; of what the layers' shapes give the smallest. Throws Error(usage).
  float break_even(const std::string& site) const;
  // site: "A", "O", "M", "Z" or "G"; n thresholds, one for each input (neuron) or one for all. Throws Error(usage),
  // also where the layout of the layer's FFN does not allow the site.
  void set(const std::string& site, int layer, const float* thresholds, size_t n);
  int dense_tokens() const;

 private:
  friend class Session;
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

class Predictor;

// Shares kept by site (A, O, M, Z: columns; G, N: neurons; H: heads), below 0 where nothing was to be skipped, and the
// share of the layers' bytes that was read for tokens of which some could have been skipped.
struct Density {
  static constexpr const char* kNames[] = {"A", "O", "M", "Z", "G", "N", "H"};
  double site[7] = {-1, -1, -1, -1, -1, -1, -1};
  double body = -1;
  double recall = -1;  // of neurons that are not 0, where a predictor was measured
};

// A KV cache and the tokens in it. One thread at a time (a second one gets Error(usage)), except `cancel`.
class Session {
 public:
  // n_ctx from 1 on; 0 = what the model was trained for. Throws Error(usage | budget).
  Session(const Model& model, int n_ctx);
  ~Session();
  Session(Session&&) noexcept;

  int n_ctx() const;
  int n_past() const;
  int n_vocab() const;
  std::vector<int32_t> tokens() const;  // whose keys and values are cached, oldest first
  size_t kv_bytes() const;              // in use
  void truncate(int n);                 // forgets all but the first n tokens

  // Appends n >= 1 tokens. Throws Error(usage) on an id out of range, Error(context) where they do not fit, and
  // Error(cancelled), which leaves the cache as it was after the last whole block.
  void eval(const int32_t* tokens, int n);
  // The same, and out [n, n_vocab] receives every token's logits.
  void eval_all(const int32_t* tokens, int n, float* out);
  // [n_vocab] of the last token, valid until the next evaluation. Throws Error(usage) when there are none.
  const float* logits() const;
  int32_t sample(Sampler* sampler);  // from the last logits; the sampler has accepted the token
  int32_t step(Sampler* sampler);    // sample, then eval of that token

  // From now on decoding skips by `sparsity` (null: dense); mask_prefill: blocks of tokens are masked as well, which
  // gives the bits of sparse decoding at the speed of a prompt. Throws Error(usage) for another model's.
  void set_sparsity(const Sparsity* sparsity, bool mask_prefill);
  // Whether decoding leaves out what the activation makes exactly 0 (ReLU and its kin; the same bits). On by default.
  void set_exact(bool on);
  // From now on decoding computes these neurons only: for each layer an ascending list, or null for all; no lists at
  // all end it. mask_prefill: blocks of tokens as well. Throws Error(usage), also where the layer's FFN is in panels.
  void set_neurons(const std::vector<const std::vector<int32_t>*>& sets, bool mask_prefill);
  // From now on decoding computes what a predictor names (predictor.h), null: everything; it goes before set_neurons.
  // mask_prefill: blocks of tokens as well, to the same bits. measure: nothing is left out; of blocks, Density says
  // what would have been kept (N) and the recall. Throws Error(usage) for another model's.
  void set_predictor(const Predictor* predictor, bool mask_prefill, bool measure);
  // Counts what the tokens of prompts do to each neuron, from zero: "griffin" or "core" (cpp/sparse/statistic.h), ""
  // ends.
  void collect(const std::string& kind);
  int64_t statistic(float* out) const;  // [n_layers, n_ff], may be null; the tokens counted
  int n_layers() const;
  int n_ff() const;
  Density density();                 // since the last call
  // Calibration: the stream before the first layer [n, n_embd], and one layer alone (n <= 256 rows at pos; taps: null,
  // or kTapNames buffers [n, tap_width], each of which may be null: inputs of A, O, M, Z before masking, act(gate)
  // before masking (G), and up (U), what multiplies it). Only while no tokens are cached.
  void embed(const int32_t* tokens, int n, float* out);
  void run_layer(int layer, int pos, const float* x, int n, float* out, float* const* taps);
  int n_embd() const;
  static constexpr int kTapCount = 6;
  static constexpr const char* kTapNames[kTapCount] = {"A", "O", "M", "Z", "G", "U"};
  int tap_width(int tap) const;      // 0: this model has no such vector

  void cancel();                     // makes the running or the next evaluation throw Error(cancelled)
  // Asked by the evaluating thread every 20 ms or so; true stops the evaluation as cancel does.
  void set_poll(std::function<bool()> poll);
  Stats stats() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

int default_threads();

// Why no GPU can be used by this build on this machine, in one line; empty where one can.
std::string gpu_problem();

// What is known of the first GPU and of this build's code for it; what is not known is empty or 0.
struct GpuInfo {
  bool built;                 // with CUDA
  std::string toolkit;        // CUDA that it was built with
  std::string architectures;  // that it was compiled for, as CMake has them
  std::string driver_cuda;    // the newest CUDA that the driver knows
  int devices;
  std::string name, capability, code;  // code: compute capability of the machine code that runs there
  int multiprocessors;
  size_t memory_bytes, free_bytes;
};
GpuInfo gpu_info();

// GB/s at which `threads` threads read a buffer of `megabytes` MB, one value a repetition.
std::vector<double> stream_gb_per_s(int threads, int megabytes, int repetitions);

}  // namespace sr
