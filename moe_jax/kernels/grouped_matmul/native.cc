// Grouped matmul for CPUs: out[s, f] = sum over d of rows[s, d] * weights[layer, expert of s, f, d].
//
// A piece of work is an expert, a panel of its rows and a chunk of its columns. Rows and columns of weights both lie
// along d. A piece of few rows is bound by memory: it packs nothing, lanes run along d, and a small block of outputs is
// held in registers while d goes by (`Few`). One of many is bound by arithmetic: its columns are turned around once,
// lanes run along them, and numbers of rows are broadcast (`Many`). Compiled for the machine at hand
// (kernels/compiled.py).

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "native.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kPanel = 128;     // rows of a piece
constexpr int64_t kFewChunk = 48;   // columns of a piece of few rows
constexpr int64_t kManyChunk = 96;  // and of one of many
constexpr int64_t kMany = 24;       // rows of a piece from which packing its columns pays
constexpr int64_t kAhead = 1024;    // bytes along d: columns are asked for so early
constexpr int64_t kWords = 512;     // along d, packed at once: they stay in the second-level cache

// Rows and columns of a block: they fill the 32 registers of AVX-512, or the 16 of what has less.
constexpr int kFewRows = kLanes == 16 ? 4 : 3, kFewColumns = kLanes == 16 ? 6 : 4;
constexpr int kManyRows = kLanes == 16 ? 8 : 4, kVectors = 3;
constexpr int64_t kManyColumns = kVectors * kLanes;

// Whether words hold numbers as they are stored, rather than widened.
template <typename T>
constexpr bool kAsStored = T::kPerWord * sizeof(typename T::Number) == sizeof(uint32_t);

// Few rows. kRows x kColumns outputs; rows and columns are `depth` numbers long and as far apart.
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
    const int64_t ahead = next < depth ? next : next + (kColumns - 1) * depth;  // on into the block behind this one
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

template <typename T>
Words LoadWords(const typename T::Number* from, int64_t count) {
  constexpr int kNumbers = kLanes * T::kPerWord;
  if (count >= kNumbers) return T::LoadWords(from);
  return T::LoadWords(Padded<T, kNumbers>(from, count).numbers);
}

// Of two vectors one behind the other, the lanes that make up the new ones where blocks of `kSize` lanes change places.
template <int kSize>
struct Swapped {
  alignas(64) uint32_t low[kLanes] = {}, high[kLanes] = {};
  constexpr Swapped() {
    for (int lane = 0; lane < kLanes; lane++) {
      low[lane] = lane & kSize ? kLanes + lane - kSize : lane;
      high[lane] = lane & kSize ? kLanes + lane : lane + kSize;
    }
  }
};

inline Words Pick(const Words& a, const Words& b, const uint32_t* lanes) {
#ifdef __AVX512F__
  return (Words)_mm512_permutex2var_epi32((__m512i)a, _mm512_load_si512(lanes), (__m512i)b);
#elif defined(__clang__)
  Words picked;
  for (int lane = 0; lane < kLanes; lane++) picked[lane] = (lanes[lane] < kLanes ? a : b)[lanes[lane] % kLanes];
  return picked;
#else
  return __builtin_shuffle(a, b, *reinterpret_cast<const Words*>(lanes));
#endif
}

// x[i][j] becomes x[j][i]: blocks of 1 lane change places, then of 2, and so on.
template <int kSize = 1>
inline void Transpose(Words x[kLanes]) {
  static constexpr Swapped<kSize> swapped;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) {
    if (i & kSize) continue;
    const Words a = x[i], b = x[i + kSize];
    x[i] = Pick(a, b, swapped.low);
    x[i + kSize] = Pick(a, b, swapped.high);
  }
  if constexpr (2 * kSize < kLanes) Transpose<2 * kSize>(x);
}

// Adds the products of kRows rows and packed columns to their sums, kVectors of a row.
template <typename T, int kRows>
void Tile(const uint32_t* rows, int64_t stride, const Words* columns, int64_t words, Floats* sums) {
  Floats tile[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) tile[r][v] = sums[r * kVectors + v];
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
    for (int v = 0; v < kVectors; v++) sums[r * kVectors + v] = tile[r][v];
}

// What a thread packs into: words of rows along d, of columns across it, and the sums of both.
struct Packed {
  alignas(64) uint32_t rows[kPanel * kWords];
  alignas(64) Words columns[kWords * kVectors];
  alignas(64) Floats sums[kManyChunk / kManyColumns][kPanel * kVectors];
};

template <typename T>
void PackColumns(const typename T::Number* columns, int64_t num_columns, int64_t depth, int64_t count, Words* to) {
  for (int v = 0; v < kVectors; v++)
    for (int64_t word = 0; word * T::kPerWord < count; word += kLanes) {
      Words turned[kLanes];
      for (int c = 0; c < kLanes; c++) {
        const int64_t column = v * kLanes + c, d = word * T::kPerWord;
        turned[c] = column < num_columns ? LoadWords<T>(columns + column * depth + d, count - d) : Words{};
      }
      Transpose(turned);
      for (int i = 0; i < kLanes; i++) to[(word + i) * kVectors + v] = turned[i];
    }
}

template <typename T, typename Out>
void Many(const typename T::Number* rows, int64_t num_rows, const typename T::Number* columns, int64_t num_columns,
          int64_t depth, typename Out::Number* out, int64_t out_stride) {
  static thread_local std::unique_ptr<Packed> kept;
  if (!kept) kept = std::make_unique<Packed>();
  Packed& packed = *kept;
  for (auto& sums : packed.sums) std::fill_n(sums, num_rows * kVectors, Floats{});
  constexpr int64_t kNumbers = kWords * T::kPerWord, kVectorNumbers = kLanes * T::kPerWord;
  for (int64_t first = 0; first < depth; first += kNumbers) {
    const int64_t count = std::min(kNumbers, depth - first);
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
      PackColumns<T>(columns + column * depth + first, num_columns - column, depth, count, packed.columns);
      int64_t r = 0;
      const auto tiles = [&](auto some) {
        for (; r + some <= num_rows; r += some)
          Tile<T, some>(packed_rows + r * stride, stride, packed.columns, words, sums + r * kVectors);
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

struct Piece {
  int64_t first_row, num_rows, expert, first_column, num_columns;
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

  auto pieces = std::make_shared<std::vector<Piece>>();
  int64_t first = 0;
  for (int64_t expert = 0; expert < num_experts; expert++) {
    const int64_t last = std::min<int64_t>(num_rows, first + std::max(0, group_sizes[expert]));
    for (int64_t row = first; row < last; row += kPanel) {
      const int64_t taken = std::min(kPanel, last - row), chunk = taken < kMany ? kFewChunk : kManyChunk;
      for (int64_t column = 0; column < num_columns; column += chunk)
        pieces->push_back({row, taken, expert, column, std::min(chunk, num_columns - column)});
    }
    first = last;
  }
  std::memset(out_data + first * num_columns, 0, (num_rows - first) * num_columns * sizeof(*out_data));

  RunPieces(pool, pieces->size(), [=](int64_t i) {
    const Piece& piece = (*pieces)[i];
    const Number* some_rows = rows_data + piece.first_row * depth;
    const Number* columns = stack + (piece.expert * num_columns + piece.first_column) * depth;
    typename Out::Number* to = out_data + piece.first_row * num_columns + piece.first_column;
    (piece.num_rows < kMany ? Few<T, Out> : Many<T, Out>)(some_rows, piece.num_rows, columns, piece.num_columns,
                                                          depth, to, num_columns);
  });
  return ffi::Error::Success();
}

ffi::Error GroupedMatmul(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::AnyBuffer weights,
                         ffi::Buffer<ffi::S32> group_sizes, ffi::Buffer<ffi::S32> layer,
                         ffi::Result<ffi::AnyBuffer> out) {
  const int64_t at = layer.typed_data()[0];
  if (at < 0 || at >= weights.dimensions()[0]) return ffi::Error::InvalidArgument("grouped_matmul: no such layer");
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
