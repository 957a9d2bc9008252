// Products of small float32 matrices, and conversions of other dtypes to float32 and back.
//
// A product is made of tiles, whose sums stay in registers: numbers of the left factor are broadcast, and lanes are
// along the rows of the right one.

#ifndef MOE_JAX_KERNELS_CAUSAL_ATTENTION_TILES_H_
#define MOE_JAX_KERNELS_CAUSAL_ATTENTION_TILES_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "native.h"

namespace {

constexpr int64_t kBlock = 64;  // queries and keys per block, to stay in the nearest caches

// Rows and vectors of a tile, to fill the registers.
#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 4;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int kRows = 6, kVectors = 2;
#else  // 16 registers of half a vector
constexpr int kRows = 4, kVectors = 1;
#endif

enum class Left { kAsItIs, kTurned };  // the sum is over its second axis, or its first
enum class Out { kSet, kAdded };

inline int64_t Whole(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

inline Floats& At(float* numbers) { return *reinterpret_cast<Floats*>(numbers); }
inline const Floats& At(const float* numbers) { return *reinterpret_cast<const Floats*>(numbers); }

template <Left kLeft, Out kOut, int kRows, int kVectors>
void Tile(const float* left, int64_t left_stride, const float* right, int64_t right_stride, int64_t depth, float* out,
          int64_t out_stride) {
  Floats sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; k++, right += right_stride) {
    Floats row[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) row[v] = At(right + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const float number = kLeft == Left::kTurned ? left[k * left_stride + r] : left[r * left_stride + k];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) sums[r][v] += number * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) {
      Floats& to = At(out + r * out_stride + v * kLanes);
      to = kOut == Out::kAdded ? to + sums[r][v] : sums[r][v];
    }
}

// Tiles one below another, for `rows` rows.
template <Left kLeft, Out kOut, int kVectors, int kTall = kRows>
void Tiles(const float* left, int64_t left_stride, int64_t rows, const float* right, int64_t right_stride,
           int64_t depth, float* out, int64_t out_stride) {
  for (; rows >= kTall; rows -= kTall, out += kTall * out_stride) {
    Tile<kLeft, kOut, kTall, kVectors>(left, left_stride, right, right_stride, depth, out, out_stride);
    left += kLeft == Left::kTurned ? kTall : kTall * left_stride;
  }
  if constexpr (kTall > 1)
    Tiles<kLeft, kOut, kVectors, kTall == 6 ? 4 : kTall / 2>(left, left_stride, rows, right, right_stride, depth, out,
                                                             out_stride);
}

// Sets or adds to out[r][c] the sum over k < `depth` of left[r][k] (kTurned: left[k][r]) * right[k][c].
// `columns` is a multiple of kLanes.
template <Left kLeft, Out kOut, int kWide = kVectors>
void Multiply(const float* left, int64_t left_stride, int64_t rows, const float* right, int64_t right_stride,
              int64_t depth, float* out, int64_t out_stride, int64_t columns) {
  for (; columns >= kWide * kLanes; columns -= kWide * kLanes, right += kWide * kLanes, out += kWide * kLanes)
    Tiles<kLeft, kOut, kWide>(left, left_stride, rows, right, right_stride, depth, out, out_stride);
  if constexpr (kWide > 1)
    Multiply<kLeft, kOut, kWide - 1>(left, left_stride, rows, right, right_stride, depth, out, out_stride, columns);
}

// out[c][r] = in[r][c]. Reads and writes whole vectors, for which the rows of `in` and `out` must have room.
inline void Turn(const float* in, int64_t in_stride, int64_t rows, int64_t columns, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      Words turned[kLanes];
      for (int i = 0; i < kLanes; i++) turned[i] = r + i < rows ? (Words)At(in + (r + i) * in_stride + c) : Words{};
      Transpose(turned);
      for (int i = 0; i < kLanes && c + i < columns; i++) At(out + (c + i) * out_stride + r) = (Floats)turned[i];
    }
}

// Converts rows of `width` numbers to float32, padded with zeros to whole vectors.
template <typename T>
void Widen(const typename T::Number* from, int64_t from_stride, int64_t rows, int64_t width, float* to,
           int64_t to_stride) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t w = 0; w < width; w += kLanes)
      At(to + r * to_stride + w) = WidenSome<T>(from + r * from_stride + w, width - w);
}

// Converts float32 rows back, times `factor`.
template <typename T>
void Narrow(const float* from, int64_t from_stride, int64_t rows, int64_t width, float factor,
            typename T::Number* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t w = 0; w < width; w++) T::Store(to + r * to_stride + w, factor * from[r * from_stride + w]);
}

// Memory of a thread, kept for its next piece of work and aligned to cache lines.
class Room {
 public:
  explicit Room(int64_t floats) {
    if (static_cast<int64_t>(kept_.size()) * kLine < floats) kept_ = std::vector<Line>(floats / kLine + 1);
    free_ = kept_.data()->numbers;
  }
  // `floats` must be a multiple of 16, as any multiple of kBlock is.
  float* Take(int64_t floats) { return (free_ += floats) - floats; }

 private:
  static constexpr int64_t kLine = 16;
  struct alignas(64) Line {
    float numbers[kLine];
  };
  inline static thread_local std::vector<Line> kept_;
  float* free_;
};

}  // namespace

#endif
