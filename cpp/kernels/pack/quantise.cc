// The search of one group: a row of trial scales around the one that maps the largest weight (or the range) to the
// codes' ends; for the codes of each trial the least-squares scale and its error are known in closed form, so a trial
// is one pass. The best few rounds of "codes for this scale, scale for these codes" follow, with the scale as it is
// stored: half.
#include "kernels/pack/quantise.h"

#include <algorithm>
#include <cmath>

#include "kernels/f16.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

constexpr int kMostColumns = 128;
constexpr int kLanes = 8;
constexpr int kRounds = 4;  // of codes and scale in turn; more change nothing in the third digit of the error

// Trials move the code that the largest weight falls on. Without minima it is the lowest code, -8 of 4 bits: from -6.5
// (wide steps) to -9.5 (the largest weight is cut, which pays where it is alone). With minima both ends move.
constexpr float kFirstEnd = -1.5f, kLastEnd = 1.5f, kEndStep = 0.125f;
constexpr float kCuts[] = {-0.5f, 0.0f, 0.5f, 1.0f};  // steps by which an end of the range is cut off

// Rounds to an integer by an addition that leaves no room for a fraction, then clamps; loops of it vectorise.
inline float to_code(float v, float top) {
  const float nearest = (v + 12582912.0f) - 12582912.0f;
  return std::min(std::max(nearest, 0.0f), top);
}

// Partial sums that the compiler can keep in vector registers; added up in one fixed order.
struct Lanes {
  float v[kLanes] = {};
  float sum() const { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }
};

// A group: weights and their importance, filled up with importance 0 to whole lanes.
struct Group {
  alignas(32) float x[kMostColumns];
  alignas(32) float w[kMostColumns];
  int n = 0;  // a multiple of kLanes
  float sum_w = 0, sum_wx = 0;
};

struct Fit {
  float scale = 0, min = 0;
};

// The scale without a minimum for the codes of `inverse`, and how much of the weights' energy it explains.
float explained(const Group& g, float inverse, float bias, float top, float* scale) {
  Lanes uu, ux;
  for (int i = 0; i < g.n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      const float x = g.x[i + k], u = to_code(x * inverse + bias, top) - bias, wu = g.w[i + k] * u;
      uu.v[k] += wu * u;
      ux.v[k] += wu * x;
    }
  }
  const float suu = uu.sum(), sux = ux.sum();
  if (!(suu > 0)) return 0;
  *scale = sux / suu;
  return sux * *scale;
}

// The same with a minimum: codes of (x - min) * inverse.
float explained_with_min(const Group& g, float inverse, float min, float top, Fit* fit) {
  Lanes u1, uu, ux;
  for (int i = 0; i < g.n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      const float x = g.x[i + k], u = to_code((x - min) * inverse, top), wu = g.w[i + k] * u;
      u1.v[k] += wu;
      uu.v[k] += wu * u;
      ux.v[k] += wu * x;
    }
  }
  const float su = u1.sum(), suu = uu.sum(), sux = ux.sum();
  const float det = g.sum_w * suu - su * su;
  if (!(det > 0)) return 0;
  fit->scale = (g.sum_w * sux - su * g.sum_wx) / det;
  fit->min = (suu * g.sum_wx - su * sux) / det;
  return fit->scale * sux + fit->min * g.sum_wx;
}

// The error of the codes that scale and minimum, as stored, lead to.
float error_of(const Group& g, float scale, float min, float top) {
  const float inverse = scale != 0 ? 1 / scale : 0;
  Lanes error;
  for (int i = 0; i < g.n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      const float d = scale * to_code((g.x[i + k] - min) * inverse, top) + min - g.x[i + k];
      error.v[k] += g.w[i + k] * d * d;
    }
  }
  return error.sum();
}

float as_half(float v) { return f16_to_f32(f32_to_f16(v)); }

Fit search_scale(const Group& g, float bias, float top) {
  float largest = 0;
  for (int i = 0; i < g.n; ++i)
    if (g.w[i] > 0 && std::fabs(g.x[i]) > std::fabs(largest)) largest = g.x[i];
  if (largest == 0) return {};
  Fit best;
  float most = -1;
  for (float end = kFirstEnd; end <= kLastEnd; end += kEndStep) {
    float scale = 0;
    const float found = explained(g, -(bias + end) / largest, bias, top, &scale);
    if (found > most) {
      most = found;
      best.scale = scale;
    }
  }
  return best;
}

Fit search_scale_and_min(const Group& g, float top) {
  float low = 0, high = 0;
  bool any = false;
  for (int i = 0; i < g.n; ++i) {
    if (!(g.w[i] > 0)) continue;
    low = any ? std::min(low, g.x[i]) : g.x[i];
    high = any ? std::max(high, g.x[i]) : g.x[i];
    any = true;
  }
  if (low == high) return {0, low};
  Fit best{(high - low) / top, low};
  float most = -1;
  for (const float below : kCuts) {
    for (const float above : kCuts) {
      const float scale = (high - low) / (top + below + above);
      Fit fit;
      const float found = explained_with_min(g, 1 / scale, low + below * scale, top, &fit);
      if (found > most) {
        most = found;
        best = fit;
      }
    }
  }
  return best;
}

// Codes, scale and minimum of one group; returns the error over its columns.
float quantise_group(const Group& g, int n, int bits, uint8_t* codes, uint16_t* scale_out, uint16_t* min_out) {
  const float top = float((1 << bits) - 1), bias = float(1 << (bits - 1));
  const bool has_min = min_out != nullptr;
  Fit trial = has_min ? search_scale_and_min(g, top) : search_scale(g, bias, top);
  Fit best;
  float least = -1;
  for (int round = 0; round < kRounds; ++round) {
    trial.scale = as_half(trial.scale);
    trial.min = has_min ? as_half(trial.min) : -bias * trial.scale;
    const float error = error_of(g, trial.scale, trial.min, top);
    if (least >= 0 && !(error < least)) break;
    least = error;
    best = trial;
    if (trial.scale == 0) break;
    const float inverse = 1 / trial.scale, min = trial.min;
    if (has_min) {
      if (!(explained_with_min(g, inverse, min, top, &trial) > 0)) break;
    } else {
      explained(g, inverse, bias, top, &trial.scale);
    }
  }
  const float inverse = best.scale != 0 ? 1 / best.scale : 0;
  for (int i = 0; i < n; ++i) codes[i] = uint8_t(to_code((g.x[i] - best.min) * inverse, top));
  *scale_out = f32_to_f16(best.scale);
  if (has_min) *min_out = f32_to_f16(best.min);
  return least;
}

}  // namespace

QuantiseError quantise_row(const float* x, const float* importance, int n, int bits, int group, uint8_t* codes,
                           uint16_t* scales, uint16_t* mins) {
  SR_CHECK(bits >= 4 && bits <= 8 && group > 0 && group <= kMostColumns);
  QuantiseError total;
  Group g;
  for (int at = 0; at < n; at += group) {
    const int count = std::min(group, n - at), padded = (count + kLanes - 1) / kLanes * kLanes;
    bool important = false;
    for (int i = 0; i < count; ++i) important = important || (importance && importance[at + i] > 0);
    g.n = padded;
    double sum_w = 0, sum_wx = 0, sum_wxx = 0;
    for (int i = 0; i < padded; ++i) {
      g.x[i] = i < count ? x[at + i] : 0.0f;
      // Where no input was ever seen, all columns count alike.
      g.w[i] = i >= count ? 0.0f : important ? importance[at + i] : 1.0f;
      const double wx = double(g.w[i]) * g.x[i];
      sum_w += g.w[i];
      sum_wx += wx;
      sum_wxx += wx * g.x[i];
    }
    g.sum_w = float(sum_w);
    g.sum_wx = float(sum_wx);
    const int k = at / group;
    const float error = quantise_group(g, count, bits, codes + at, scales + k, mins ? mins + k : nullptr);
    if (!importance || important) {
      total.error += error;
      total.weight += sum_wxx;
    }
  }
  return total;
}

}  // namespace sr
