// A piece of few rows is bound by memory: nothing is packed, lanes are along d, and the sums of a small block of
// outputs stay in registers.

#ifndef MOE_JAX_KERNELS_GROUPED_MATMUL_FEW_H_
#define MOE_JAX_KERNELS_GROUPED_MATMUL_FEW_H_

#include <cstdint>

#include "native.h"

namespace {

constexpr int64_t kAhead = 1024;  // bytes along d by which columns are prefetched

// Rows and columns of a block, to fill the 32 registers of AVX-512, or the 16 of other processors.
constexpr int kFewRows = kLanes == 16 ? 4 : 3, kFewColumns = kLanes == 16 ? 6 : 4;

// kRows x kColumns outputs; rows and columns have `depth` numbers each, one after another.
template <typename T, typename Out, int kRows, int kColumns>
void Block(const typename T::Number* rows, const typename T::Number* columns, int64_t depth,
           typename Out::Number* out, int64_t out_stride) {
  Floats sums[kRows][kColumns] = {};
  int64_t d = 0;
  for (; d + T::kStep <= depth; d += T::kStep) {
    typename T::Pack row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) row[r] = T::Load(rows + r * depth + d);
    const int64_t next = d + kAhead / static_cast<int64_t>(sizeof(*columns));
    const int64_t ahead = next < depth ? next : next + (kColumns - 1) * depth;  // on into the next block
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; c++) {
      __builtin_prefetch(columns + c * depth + ahead, 0, 3);
      const typename T::Pack column = T::Load(columns + c * depth + d);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) T::Add(sums[r][c], row[r], column);
    }
  }
  if (d < depth) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const Padded<T, T::kStep> row(rows + r * depth + d, depth - d);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; c++) {
        const Padded<T, T::kStep> column(columns + c * depth + d, depth - d);
        T::Add(sums[r][c], T::Load(row.numbers), T::Load(column.numbers));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; c++) Out::Store(out + r * out_stride + c, Sum(sums[r][c]));
}

template <typename T, typename Out, int kColumns>
void FewRows(const typename T::Number* rows, int64_t num_rows, const typename T::Number* columns, int64_t depth,
          typename Out::Number* out, int64_t out_stride) {
  for (; num_rows >= kFewRows; num_rows -= kFewRows, rows += kFewRows * depth, out += kFewRows * out_stride)
    Block<T, Out, kFewRows, kColumns>(rows, columns, depth, out, out_stride);
  if (num_rows == 3) Block<T, Out, 3, kColumns>(rows, columns, depth, out, out_stride);
  if (num_rows == 2) Block<T, Out, 2, kColumns>(rows, columns, depth, out, out_stride);
  if (num_rows == 1) Block<T, Out, 1, kColumns>(rows, columns, depth, out, out_stride);
}

template <typename T, typename Out>
void Few(const typename T::Number* rows, int64_t num_rows, const typename T::Number* columns, int64_t num_columns,
         int64_t depth, typename Out::Number* out, int64_t out_stride) {
  for (; num_columns >= kFewColumns; num_columns -= kFewColumns, columns += kFewColumns * depth, out += kFewColumns)
    FewRows<T, Out, kFewColumns>(rows, num_rows, columns, depth, out, out_stride);
  for (; num_columns > 0; num_columns--, columns += depth, out++)
    FewRows<T, Out, 1>(rows, num_rows, columns, depth, out, out_stride);
}

}  // namespace

#endif
