// Weights to codes: for each group of a row the scale (and minimum) that makes the weighted squared error small.
#pragma once

#include <cstdint>

namespace sr {

struct QuantiseError {
  double error = 0;   // sum of importance * (weight - stored weight)^2
  double weight = 0;  // sum of importance * weight^2
};

// One row of n weights to codes of `bits` bits (4 to 8) in groups of `group` columns (a multiple of 16 up to 128; the
// last may be shorter). A weight becomes scale * (u - 2^(bits-1)), or scale * u + min where mins is not null. scales,
// mins [ceil(n / group)] are half bits; one that does not fit is infinite. importance [n] >= 0 weighs squared errors:
// the mean square of the input that a column multiplies; null weighs all alike.
QuantiseError quantise_row(const float* x, const float* importance, int n, int bits, int group, uint8_t* codes,
                           uint16_t* scales, uint16_t* mins);

}  // namespace sr
