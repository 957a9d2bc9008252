// A piece of few rows is bound by memory: nothing is packed, lanes are along d, and the sums of a small block of
// outputs stay in registers.

#ifndef MOE_JAX_KERNELS_GROUPED_MATMUL_FEW_H_
#define MOE_JAX_KERNELS_GROUPED_MATMUL_FEW_H_

#include <cstdint>
#include <type_traits>

#include "native.h"

namespace {

// The scales of the blocks of one matrix in eight bits, seen from column `first` on. Without a matrix: none.
struct Scales {
  const float* matrix = nullptr;
  int64_t outputs = 1, inputs = 1;  // of a block
  int64_t across = 1;               // blocks of a column
  int64_t first = 0;
  float At(int64_t column, int64_t d) const { return matrix[(first + column) / outputs * across + d / inputs]; }
};

constexpr int64_t kAhead = 1024;  // bytes along d by which columns are prefetched

// Rows and columns of a block, to fill the 32 registers of AVX-512, or the 16 of other processors.
constexpr int kFewRows = kLanes == 16 ? 4 : 3, kFewColumns = kLanes == 16 ? 6 : 4;

// Adds the products of kRows rows and kColumns columns, from `begin` up to `end` along d, to the sums.
template <typename T, typename W, int kRows, int kColumns>
[[gnu::always_inline]] inline void AddProducts(Floats (&sums)[kRows][kColumns], const typename T::Number* rows,
                                               const typename W::Number* columns, int64_t depth, int64_t begin,
                                               int64_t end) {
  int64_t d = begin;
  for (; d + T::kStep <= end; d += T::kStep) {
    typename T::Pack row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) row[r] = T::Load(rows + r * depth + d);
    const int64_t next = d + kAhead / static_cast<int64_t>(sizeof(*columns));
    const int64_t ahead = next < depth ? next : next + (kColumns - 1) * depth;  // on into the next block
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; c++) {
      __builtin_prefetch(columns + c * depth + ahead, 0, 3);
      const typename T::Pack column = LoadAs<T, W>(columns + c * depth + d);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) T::Add(sums[r][c], row[r], column);
    }
  }
  if (d < end) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const Padded<T, T::kStep> row(rows + r * depth + d, end - d);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; c++) {
        const Padded<W, T::kStep> column(columns + c * depth + d, end - d);
        T::Add(sums[r][c], T::Load(row.numbers), LoadAs<T, W>(column.numbers));
      }
    }
  }
}

// kRows x kColumns outputs; rows and columns have `depth` numbers each, one after another. In eight bits, the sums of
// each block along d are scaled by column.
template <typename T, typename W, typename Out, int kRows, int kColumns>
void Block(const typename T::Number* rows, const typename W::Number* columns, int64_t depth, const Scales& scales,
           typename Out::Number* out, int64_t out_stride) {
  Floats sums[kRows][kColumns] = {};
  if constexpr (std::is_same_v<T, W>) {
    AddProducts<T, W>(sums, rows, columns, depth, 0, depth);
  } else {
    for (int64_t begin = 0; begin < depth; begin += scales.inputs) {
      Floats part[kRows][kColumns] = {};
      AddProducts<T, W>(part, rows, columns, depth, begin, begin + scales.inputs);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; c++) {
        const float scale = scales.At(c, begin);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++) sums[r][c] += part[r][c] * scale;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; c++) Out::Store(out + r * out_stride + c, Sum(sums[r][c]));
}

template <typename T, typename W, typename Out, int kColumns>
void FewRows(const typename T::Number* rows, int64_t num_rows, const typename W::Number* columns, int64_t depth,
             const Scales& scales, typename Out::Number* out, int64_t out_stride) {
  for (; num_rows >= kFewRows; num_rows -= kFewRows, rows += kFewRows * depth, out += kFewRows * out_stride)
    Block<T, W, Out, kFewRows, kColumns>(rows, columns, depth, scales, out, out_stride);
  if (num_rows == 3) Block<T, W, Out, 3, kColumns>(rows, columns, depth, scales, out, out_stride);
  if (num_rows == 2) Block<T, W, Out, 2, kColumns>(rows, columns, depth, scales, out, out_stride);
  if (num_rows == 1) Block<T, W, Out, 1, kColumns>(rows, columns, depth, scales, out, out_stride);
}

template <typename T, typename W, typename Out>
void Few(const typename T::Number* rows, int64_t num_rows, const typename W::Number* columns, int64_t num_columns,
         int64_t depth, Scales scales, typename Out::Number* out, int64_t out_stride) {
  for (; num_columns >= kFewColumns; num_columns -= kFewColumns, columns += kFewColumns * depth, out += kFewColumns) {
    FewRows<T, W, Out, kFewColumns>(rows, num_rows, columns, depth, scales, out, out_stride);
    scales.first += kFewColumns;
  }
  for (; num_columns > 0; num_columns--, columns += depth, out++, scales.first++)
    FewRows<T, W, Out, 1>(rows, num_rows, columns, depth, scales, out, out_stride);
}

}  // namespace

#endif
