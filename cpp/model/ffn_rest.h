// The FFNs of neurons that do not fit another device: computed here, from the packed weights, while the device computes
// the others. What comes out is added to the device's part.
#pragma once

#include <map>
#include <vector>

#include "base/thread_pool.h"
#include "model/ffn_part.h"
#include "sparse/plan.h"

namespace sr {

class FfnRest {
 public:
  // What of a layer's inputs and neurons is left out. Thresholds are indexed by this part's neurons.
  struct Masks {
    Thresholds in, gate, z;  // sites M, G and Z
    float break_even_in = 1, break_even_z = 1;  // shares kept above which a product of one row runs dense
    bool exact = false;      // of one row: also neurons that are exactly 0
    int first = 0;           // rows before it are not masked by thresholds
  };
  // Neurons kept where something was to be left out.
  struct Kept {
    int gate = 0, z = 0;
  };

  // config must outlive this object.
  FfnRest(const DecoderConfig& config, int threads, int max_rows);
  // Before the first run: the layer's neurons that are computed here, some or all of them. All, where a norm lies
  // before down.
  void add(int layer, FfnPart part);

  bool has(int layer) const { return layers_.count(layer) > 0; }
  const FfnPart& part(int layer) const { return layers_.at(layer).part; }
  size_t bytes() const { return bytes_; }  // of weights

  // x [n, ldx]: what the FFN multiplies, after its norm; y [n, ldy]: what down makes of this part's neurons, to whole
  // tiles.
  Kept run(int layer, const float* x, size_t ldx, int n, const Masks& masks, float* y, size_t ldy);

 private:
  struct Layer {
    FfnPart part;
    std::vector<int> units, in_share, down_share;  // [threads + 1] units of 64 neurons, tiles of ffn_in, tiles of down
    std::vector<float> kept_share;                 // [threads] of the last token's neurons
    int neurons() const { return part.neurons(); }
    const LayerWeights& weights() const { return part.weights(); }
  };
  struct Thread {
    AlignedBuffer<float> tile;  // [max_rows, 2 tiles]
    AlignedBuffer<char> scratch;
    std::vector<int32_t> survivors;
    Kept kept;
  };
  struct Job {
    Layer* layer;
    const float* x;
    size_t ldx;
    int n;
    const Masks* masks;
    float* y;
    size_t ldy;
    InputBuffer* z;
  };

  void prepare(const Job& job, int row);
  void one(int tid, const Job& job);
  void one_by_neuron(int tid, const Job& job);
  void block(int tid, const Job& job);
  void block_unit(Thread& t, const Job& job, int unit);
  Thresholds z_threshold(const Job& job, int row) const;

  const DecoderConfig& config_;
  ThreadPool pool_;
  int max_rows_;
  bool true_zeros_;
  size_t bytes_ = 0;
  std::map<int, Layer> layers_;
  std::map<int, InputBuffer> z_;  // by width, which is the distance of its rows
  InputBuffer in_;
  AlignedBuffer<float> gate_up_;  // [2 n_ff] of one row
  std::vector<Thread> thread_;
  WorkCounter counter_[2];
};

}  // namespace sr
