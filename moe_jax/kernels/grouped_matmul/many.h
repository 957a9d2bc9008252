// A piece of many rows is bound by arithmetic: its columns are transposed once, lanes are columns, and numbers of rows
// are broadcast.

#ifndef MOE_JAX_KERNELS_GROUPED_MATMUL_MANY_H_
#define MOE_JAX_KERNELS_GROUPED_MATMUL_MANY_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "few.h"
#include "native.h"

namespace {

constexpr int64_t kPanel = 128;     // rows of a piece, at most
constexpr int64_t kManyChunk = 96;  // columns of a piece, at most
constexpr int64_t kWords = 512;     // along d, packed at once, to stay in the second-level cache

// Rows and columns of a block, as in few.h.
constexpr int kManyRows = kLanes == 16 ? 8 : 4, kVectors = 3;
constexpr int64_t kManyColumns = kVectors * kLanes;

// Whether words hold numbers as stored, not widened.
template <typename T>
constexpr bool kAsStored = T::kPerWord * sizeof(typename T::Number) == sizeof(uint32_t);

// Adds the products of kRows rows and packed columns to the sums, kVectors per row; scaled by column, if they are.
template <typename T, int kRows, bool kScaled>
void Tile(const uint32_t* rows, int64_t stride, const Words* columns, int64_t words, const Floats* scale,
          Floats* sums) {
  Floats tile[kRows][kVectors] = {};
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++)
      if constexpr (!kScaled) tile[r][v] = sums[r * kVectors + v];
  for (int64_t word = 0; word < words; word++, columns += kVectors) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const Words row = Words{} + rows[r * stride + word];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) T::AddWords(tile[r][v], row, columns[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) {
      Floats& sum = sums[r * kVectors + v];
      sum = kScaled ? sum + tile[r][v] * scale[v] : tile[r][v];
    }
}

// The buffers of a thread: words of rows along d, words of columns across d, and the sums.
struct Packed {
  alignas(64) uint32_t rows[kPanel * kWords];
  alignas(64) Words columns[kWords * kVectors];
  alignas(64) Floats sums[kManyChunk / kManyColumns][kPanel * kVectors];
};

template <typename T, typename W>
void PackColumns(const typename W::Number* columns, int64_t num_columns, int64_t depth, int64_t count, Words* to) {
  for (int v = 0; v < kVectors; v++)
    for (int64_t word = 0; word * T::kPerWord < count; word += kLanes) {
      Words turned[kLanes];
      for (int c = 0; c < kLanes; c++) {
        const int64_t column = v * kLanes + c, d = word * T::kPerWord;
        turned[c] = column < num_columns ? LoadWords<T, W>(columns + column * depth + d, count - d) : Words{};
      }
      Transpose(turned);
      for (int i = 0; i < kLanes; i++) to[(word + i) * kVectors + v] = turned[i];
    }
}

template <typename T, typename W, typename Out>
void Many(const typename T::Number* rows, int64_t num_rows, const typename W::Number* columns, int64_t num_columns,
          int64_t depth, Scales scales, typename Out::Number* out, int64_t out_stride) {
  constexpr bool kScaled = !std::is_same_v<T, W>;
  static thread_local std::unique_ptr<Packed> kept;
  if (!kept) kept = std::make_unique<Packed>();
  Packed& packed = *kept;
  for (auto& sums : packed.sums) std::fill_n(sums, num_rows * kVectors, Floats{});
  constexpr int64_t kNumbers = kWords * T::kPerWord, kVectorNumbers = kLanes * T::kPerWord;
  for (int64_t first = 0, count; first < depth; first += count) {
    count = std::min(kNumbers, depth - first);
    if (kScaled) count = std::min(count, scales.inputs - first % scales.inputs);  // within a block
    const int64_t words = (count + kVectorNumbers - 1) / kVectorNumbers * kLanes;
    const uint32_t* packed_rows = packed.rows;
    int64_t stride = kWords;
    if (kAsStored<T> && count % kVectorNumbers == 0 && depth % T::kPerWord == 0) {
      packed_rows = reinterpret_cast<const uint32_t*>(rows + first);  // they are words already
      stride = depth / T::kPerWord;
    } else {
      for (int64_t r = 0; r < num_rows; r++)
        for (int64_t word = 0, d = 0; word < words; word += kLanes, d += kVectorNumbers)
          *reinterpret_cast<Words*>(packed.rows + r * kWords + word) =
              LoadWords<T>(rows + r * depth + first + d, count - d);
    }
    for (int64_t column = 0; column < num_columns; column += kManyColumns) {
      Floats* sums = packed.sums[column / kManyColumns];
      PackColumns<T, W>(columns + column * depth + first, num_columns - column, depth, count, packed.columns);
      Floats scale[kVectors] = {};
      if constexpr (kScaled)
        for (int64_t c = 0; c < std::min(kManyColumns, num_columns - column); c++)
          scale[c / kLanes][c % kLanes] = scales.At(column + c, first);
      int64_t r = 0;
      const auto tiles = [&](auto some) {
        for (; r + some <= num_rows; r += some)
          Tile<T, some, kScaled>(packed_rows + r * stride, stride, packed.columns, words, scale, sums + r * kVectors);
      };
      tiles(std::integral_constant<int, kManyRows>());
      tiles(std::integral_constant<int, kManyRows / 2>());
      tiles(std::integral_constant<int, 1>());
    }
  }
  for (int64_t r = 0; r < num_rows; r++)
    for (int64_t column = 0; column < num_columns; column++) {
      const int64_t at = column % kManyColumns;
      const Floats& sums = packed.sums[column / kManyColumns][r * kVectors + at / kLanes];
      Out::Store(out + r * out_stride + column, sums[at % kLanes]);
    }
}

}  // namespace

#endif
