// Rotary position embedding: pairs of a head's dimensions are turned by position * frequency.
#pragma once

#include <vector>

#include "model/decoder_config.h"

namespace sr {

class Rope {
 public:
  // factors [dims / 2] divide the frequencies; null = all 1.
  Rope(RopeStyle style, int dims, double theta, const float* factors, float mscale);

  // Floats that `fill` writes for one position: cosines, then sines.
  int table_size() const { return dims_; }
  void fill(int pos, float* table) const;
  // Radians a position, [dims / 2].
  const std::vector<double>& frequency() const { return frequency_; }
  // Turns the first `dims` entries of one head.
  void apply(const float* table, float* head) const;

 private:
  RopeStyle style_;
  int dims_;
  float mscale_;
  std::vector<double> frequency_;  // [dims / 2]
};

}  // namespace sr
