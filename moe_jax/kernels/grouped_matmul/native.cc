// Grouped matmul for CPUs: out[s, f] = sum over d of rows[s, d] * weights[layer, expert of s, f, d].
//
// A piece of work is an expert, a panel of its rows and a chunk of its columns. Both rows and columns of weights are
// contiguous along d. How a piece is multiplied depends on its number of rows: few.h, many.h, tiled.h. Compiled for
// this machine (kernels/compiled.py).

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "few.h"
#include "many.h"
#include "native.h"
#include "tiled.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kMany = 24;         // with this many rows or more, packing columns pays
constexpr int64_t kFewChunk = 48;     // columns of a piece of few rows
constexpr int64_t kTiled = 4;         // with this many rows or more, tiles pay
constexpr int64_t kTiledChunk = 256;  // columns of such a piece; its rows are packed once for them

struct Piece {
  int64_t first_row, num_rows, expert, first_column, num_columns;
};

// How a piece is multiplied, and how many columns it has.
template <typename T, typename Out>
struct Form {
  void (*multiply)(const typename T::Number* rows, int64_t num_rows, const typename T::Number* columns,
                   int64_t num_columns, int64_t depth, typename Out::Number* out, int64_t out_stride);
  int64_t columns;
};

template <typename T, typename Out>
Form<T, Out> FormFor(int64_t num_rows) {
#ifdef MOE_JAX_TILES
  if constexpr (std::is_same_v<T, BFloat16>)
    if (num_rows >= kTiled && TilesAllowed()) return {Tiled<Out>, kTiledChunk};
#endif
  if (num_rows >= kMany) return {Many<T, Out>, kManyChunk};
  return {Few<T, Out>, kFewChunk};
}

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
      const int64_t taken = std::min(kPanel, last - row), chunk = FormFor<T, Out>(taken).columns;
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
    FormFor<T, Out>(piece.num_rows)
        .multiply(some_rows, piece.num_rows, columns, piece.num_columns, depth, to, num_columns);
  });
  return ffi::Error::Success();
}

ffi::Error GroupedMatmul(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::AnyBuffer weights,
                         ffi::Buffer<ffi::S32> group_sizes, ffi::Buffer<ffi::S32> layer,
                         ffi::Result<ffi::AnyBuffer> out) {
  const int64_t at = layer.typed_data()[0];
  if (at < 0 || at >= weights.dimensions()[0]) return ffi::Error::InvalidArgument("grouped_matmul: no such layer");
  const bool is_float32 = out->element_type() == ffi::F32;
  if (!is_float32 && out->element_type() != rows.element_type()) {
    return ffi::Error::InvalidArgument("grouped_matmul: expected an output of float32, or of the type of the rows");
  }
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
      return ffi::Error::InvalidArgument("grouped_matmul: expected float32, float16 or bfloat16");
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
