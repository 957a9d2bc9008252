// Which keys of a block the queries of a block see, and the softmax of their scores. Scores are stored as [key][query]
// in rows of kBlock, so that lanes are queries; they are in units of ln 2.

#ifndef MOE_JAX_KERNELS_CAUSAL_ATTENTION_SOFTMAX_H_
#define MOE_JAX_KERNELS_CAUSAL_ATTENTION_SOFTMAX_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "native.h"
#include "tiles.h"

namespace {

typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Positions [first, first + count) of a row.
struct Span {
  int64_t first, count;
  int64_t end() const { return first + count; }
};

inline Span BlockOf(int64_t block, int64_t length) {
  return {block * kBlock, std::min(kBlock, length - block * kBlock)};
}

enum class Sight { kNothing, kSome, kAll };

// kSome also where only a check of every pair would tell.
inline Sight See(const int32_t* segments, Span queries, Span keys) {
  const auto range = [=](Span span) {
    int32_t least = segments[span.first], most = least;
    for (int64_t i = span.first; i < span.end(); i++) {
      least = std::min(least, segments[i]);
      most = std::max(most, segments[i]);
    }
    return std::pair(least, most);
  };
  const auto [least, most] = range(queries);
  const auto [key_least, key_most] = range(keys);
  if (key_least >= 0 && (key_most < least || key_least > most)) return Sight::kNothing;
  const bool before = keys.end() <= queries.first + 1;
  const bool one_segment = least == most && key_least == key_most && least == key_least;
  return before && (one_segment || key_most < 0) ? Sight::kAll : Sight::kSome;
}

// Scores of keys that a query does not see become -infinity.
inline void Hide(const int32_t* segments, Span queries, Span keys, float* scores) {
  const Words hidden = (Words)(Floats{} - kInfinity);
  for (int64_t lane = 0; lane < queries.count; lane += kLanes) {
    Ints place, segment = {};
    for (int i = 0; i < kLanes; i++) place[i] = queries.first + lane + i;
    std::copy_n(segments + queries.first + lane, std::min<int64_t>(kLanes, queries.count - lane),
                reinterpret_cast<int32_t*>(&segment));
    for (int64_t k = 0; k < keys.count; k++) {
      const int32_t key = keys.first + k, of_key = segments[key];
      const Words seen = (Words)((place >= key) & ((segment == of_key) | (of_key < 0 ? -1 : 0)));
      Floats& score = At(scores + k * kBlock + lane);
      score = (Floats)((seen & (Words)score) | (~seen & hidden));
    }
  }
}

// 2^x for x below 127, within 2 units in the last place; 0 below -126. The polynomial is that of Cephes' exp2f.
inline Floats Exp2(Floats x) {
  constexpr float kShift = 1.5f * (1 << 23);  // adding it puts the nearest integer into the lowest bits
  const Floats shifted = x + kShift, rest = x - (shifted - kShift);
  const Floats power = (Floats)(((Words)shifted << 23) + (127u << 23));
  Floats sum = rest * 1.535336188319500e-4f + 1.339887440266574e-3f;
  sum = sum * rest + 9.618437357674640e-3f;
  sum = sum * rest + 5.550332471162809e-2f;
  sum = sum * rest + 2.402264791363012e-1f;
  sum = sum * rest + 6.931472028550421e-1f;
  sum = sum * rest + 1.0f;
  const Words vanishes = (Words)(x < -126.0f);
  return (Floats)(~vanishes & (Words)(sum * power));
}

// The running softmax of a block of queries: their greatest scores so far, and the sums of 2^(score - greatest).
struct Softmax {
  alignas(64) float greatest[kBlock], sum[kBlock];
  Softmax() {
    std::fill_n(greatest, kBlock, -kInfinity);
    std::fill_n(sum, kBlock, 0.0f);
  }

  // Turns the scores of more keys into shares, not yet divided by the sum; rescales the values mixed so far, which are
  // `rows` rows of [..][query], to match.
  void Add(float* scores, int64_t keys, int64_t queries, float* mixed, int64_t rows) {
    for (int64_t lane = 0; lane < queries; lane += kLanes) {
      const Floats before = At(greatest + lane);
      Floats most = before;
      for (int64_t k = 0; k < keys; k++) {
        const Floats score = At(scores + k * kBlock + lane);
        most = score > most ? score : most;
      }
      const Floats factor = Exp2(before - most);
      Floats total = At(sum + lane) * factor;
      for (int64_t k = 0; k < keys; k++) {
        Floats& score = At(scores + k * kBlock + lane);
        score = Exp2(score - most);
        total += score;
      }
      At(greatest + lane) = most;
      At(sum + lane) = total;
      for (int64_t row = 0; row < rows; row++) At(mixed + row * kBlock + lane) *= factor;
    }
  }

  // The log-sum-exp of one query, in base 2.
  float LogSumExp(int64_t query) const { return greatest[query] + std::log2(sum[query]); }
};

}  // namespace

#endif
