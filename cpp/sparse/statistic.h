// What a prompt's tokens did to each neuron, accumulated while the prompt is computed: what fixed sets are chosen by.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sr {

// griffin: sum over tokens t of (z[t, j] / ||z[t]||)^2 (arXiv 2404.01365). core: in how many tokens' cores neuron j is,
// a core being the largest fifth (rounded up) of a token's positive z, of equal ones the first (arXiv 2410.18311). Sums
// are made token by token, so that they do not depend on how a prompt is cut into blocks, nor on threads.
class NeuronStatistic {
 public:
  // "griffin" or "core", else Error(usage). Blocks have at most max_rows tokens.
  NeuronStatistic(const std::string& kind, int n_layers, int n_ff, int max_rows);

  // A block of a layer: first every row of z [n_ff] is looked at, by any thread; when all have been, neurons [begin,
  // end) of its n rows are added, by the thread that owns them.
  void look(int row, const float* z);
  void add(int layer, int n, const float* z, size_t ldz, int begin, int end);

  // Around the layers of a block: a block that was given up counts nothing.
  void begin_block() { before_ = sums_; }
  void undo_block() { sums_ = before_; }
  void end_block(int n) { tokens_ += n; }

  int64_t tokens() const { return tokens_; }
  const std::vector<double>& sums() const { return sums_; }  // [n_layers, n_ff]

 private:
  bool core_;
  int n_ff_;
  int64_t tokens_ = 0;
  std::vector<double> sums_, before_;
  std::vector<double> factor_;   // griffin: [max_rows] 1 / ||z[t]||^2
  std::vector<uint8_t> marks_;   // core: [max_rows, n_ff]
};

}  // namespace sr
