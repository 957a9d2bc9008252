// Grouped matmul for CPUs: out[s, f] = sum over d of rows[s, d] * weights[layer, expert of s, f, d].
//
// Rows and columns of weights both lie along d, so nothing is packed or copied: a small block of outputs is held in
// registers while d goes by. Work is cut into pieces (an expert, a panel of its rows, a chunk of its columns) that the
// calling thread and XLA's own pool take from one counter. Compiled for the machine at hand (kernels/compiled.py).

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kLanes = 16;
constexpr int64_t kPanelBytes = 1 << 19;  // of rows: they stay in the second-level cache while columns go by
constexpr int64_t kChunk = 48;            // columns of a piece
constexpr int kColumns = 6;               // of a block: with 4 rows they fill the 32 registers of AVX-512

typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef _Float16 Float16s __attribute__((vector_size(2 * kLanes), aligned(2)));

// What a dtype is made of: `Pack` holds kStep numbers along d, and `Add` adds their products to 16 partial sums.
struct Float32 {
  using Number = float;
  using Pack = Floats;
  static constexpr int kStep = kLanes;
  static Pack Load(const Number* from) { return *reinterpret_cast<const Floats*>(from); }
  static void Add(Floats& sums, const Pack& a, const Pack& b) { sums += a * b; }
  static void Store(Number* to, float x) { *to = x; }
};

struct Float16 {
  using Number = _Float16;
  using Pack = Floats;
  static constexpr int kStep = kLanes;
  static Pack Load(const Number* from) {
    return __builtin_convertvector(*reinterpret_cast<const Float16s*>(from), Floats);
  }
  static void Add(Floats& sums, const Pack& a, const Pack& b) { sums += a * b; }
  static void Store(Number* to, float x) { *to = static_cast<_Float16>(x); }
};

struct BFloat16 {
  using Number = uint16_t;
#ifdef __AVX512BF16__
  using Pack = __m512bh;
  static constexpr int kStep = 2 * kLanes;
  static Pack Load(const Number* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static void Add(Floats& sums, const Pack& a, const Pack& b) {
    sums = (Floats)_mm512_dpbf16_ps((__m512)sums, a, b);
  }
#else
  using Pack = Floats;
  static constexpr int kStep = kLanes;
  static Pack Load(const Number* from) {
    return (Floats)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16);
  }
  static void Add(Floats& sums, const Pack& a, const Pack& b) { sums += a * b; }
#endif
  static void Store(Number* to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    *to = is_nan ? (bits >> 16) | 64 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  }
};

inline float Sum(Floats x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#endif
  float sums[kLanes];
  std::memcpy(sums, &x, sizeof(sums));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) sums[i] += sums[i + width];
  return sums[0];
}

template <typename T>
typename T::Pack LoadTail(const typename T::Number* from, int64_t count) {
  typename T::Number padded[T::kStep] = {};
  std::memcpy(padded, from, count * sizeof(*from));
  return T::Load(padded);
}

// kRows x kColumns outputs; rows and columns are `depth` numbers long and as far apart.
template <typename T, typename Out, int kRows, int kColumns>
void Block(const typename T::Number* rows, const typename T::Number* columns, int64_t depth,
           typename Out::Number* out, int64_t out_stride) {
  Floats sums[kRows][kColumns] = {};
  int64_t d = 0;
  for (; d + T::kStep <= depth; d += T::kStep) {
    typename T::Pack row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) row[r] = T::Load(rows + r * depth + d);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; c++) {
      const typename T::Pack column = T::Load(columns + c * depth + d);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) T::Add(sums[r][c], row[r], column);
    }
  }
  if (d < depth) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const typename T::Pack row = LoadTail<T>(rows + r * depth + d, depth - d);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; c++) T::Add(sums[r][c], row, LoadTail<T>(columns + c * depth + d, depth - d));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; c++) Out::Store(out + r * out_stride + c, Sum(sums[r][c]));
}

template <typename T, typename Out, int kColumns>
void Rows(const typename T::Number* rows, int64_t num_rows, const typename T::Number* columns, int64_t depth,
          typename Out::Number* out, int64_t out_stride) {
  for (; num_rows >= 4; num_rows -= 4, rows += 4 * depth, out += 4 * out_stride)
    Block<T, Out, 4, kColumns>(rows, columns, depth, out, out_stride);
  if (num_rows == 3) Block<T, Out, 3, kColumns>(rows, columns, depth, out, out_stride);
  if (num_rows == 2) Block<T, Out, 2, kColumns>(rows, columns, depth, out, out_stride);
  if (num_rows == 1) Block<T, Out, 1, kColumns>(rows, columns, depth, out, out_stride);
}

struct Piece {
  int64_t first_row, num_rows, expert, first_column, num_columns;
};

// What the threads share: whoever comes late finds no piece left.
struct Work {
  std::vector<Piece> pieces;
  std::atomic<int64_t> next{0}, done{0};
};

template <typename T, typename Out>
ffi::Error Multiply(ffi::ThreadPool& pool, const ffi::AnyBuffer& rows, const ffi::AnyBuffer& weights,
                    const ffi::Buffer<ffi::S32>& sizes, int64_t layer, ffi::Result<ffi::AnyBuffer>& out) {
  using Number = typename T::Number;
  const int64_t num_experts = sizes.element_count();
  const int32_t* group_sizes = sizes.typed_data();
  const int64_t num_rows = rows.dimensions()[0], depth = rows.dimensions()[1];
  const int64_t num_columns = out->dimensions()[1];
  const Number* rows_data = static_cast<const Number*>(rows.untyped_data());
  const Number* stack = static_cast<const Number*>(weights.untyped_data()) + layer * num_experts * num_columns * depth;
  typename Out::Number* out_data = static_cast<typename Out::Number*>(out->untyped_data());
  const int64_t panel = std::max<int64_t>(4, kPanelBytes / (depth * sizeof(Number)) / 4 * 4);

  auto work = std::make_shared<Work>();
  int64_t first = 0;
  for (int64_t expert = 0; expert < num_experts; expert++) {
    const int64_t last = std::min<int64_t>(num_rows, first + std::max(0, group_sizes[expert]));
    for (int64_t row = first; row < last; row += panel)
      for (int64_t column = 0; column < num_columns; column += kChunk)
        work->pieces.push_back({row, std::min(panel, last - row), expert, column,
                                std::min(kChunk, num_columns - column)});
    first = last;
  }
  std::memset(out_data + first * num_columns, 0, (num_rows - first) * num_columns * sizeof(*out_data));

  auto run = [=] {
    const int64_t count = work->pieces.size();
    for (int64_t i = work->next++; i < count; i = work->next++) {
      const Piece& piece = work->pieces[i];
      const Number* some_rows = rows_data + piece.first_row * depth;
      const Number* columns = stack + (piece.expert * num_columns + piece.first_column) * depth;
      typename Out::Number* to = out_data + piece.first_row * num_columns + piece.first_column;
      int64_t left = piece.num_columns;
      for (; left >= kColumns; left -= kColumns, columns += kColumns * depth, to += kColumns)
        Rows<T, Out, kColumns>(some_rows, piece.num_rows, columns, depth, to, num_columns);
      for (; left > 0; left--, columns += depth, to++)
        Rows<T, Out, 1>(some_rows, piece.num_rows, columns, depth, to, num_columns);
      work->done++;
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), work->pieces.size()) - 1;
  for (int64_t helper = 0; helper < helpers; helper++) pool.Schedule(std::function<void()>(run));
  run();
  while (work->done < static_cast<int64_t>(work->pieces.size())) std::this_thread::yield();
  return ffi::Error::Success();
}

ffi::Error GroupedMatmul(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::AnyBuffer weights,
                         ffi::Buffer<ffi::S32> group_sizes, ffi::Buffer<ffi::S32> layer,
                         ffi::Result<ffi::AnyBuffer> out) {
  const int64_t at = layer.typed_data()[0];
  const bool is_float32 = out->element_type() == ffi::F32;
  switch (rows.element_type()) {
    case ffi::F32:
      return Multiply<Float32, Float32>(pool, rows, weights, group_sizes, at, out);
    case ffi::F16:
      return is_float32 ? Multiply<Float16, Float32>(pool, rows, weights, group_sizes, at, out)
                        : Multiply<Float16, Float16>(pool, rows, weights, group_sizes, at, out);
    case ffi::BF16:
      return is_float32 ? Multiply<BFloat16, Float32>(pool, rows, weights, group_sizes, at, out)
                        : Multiply<BFloat16, BFloat16>(pool, rows, weights, group_sizes, at, out);
    default:
      return ffi::Error::InvalidArgument("grouped_matmul: wanted float32, float16 or bfloat16");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_jax_grouped_matmul, GroupedMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());
