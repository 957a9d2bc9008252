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

// How a piece is multiplied, and how many columns it has. Weights of W are those of rows, or have eight bits.
template <typename T, typename W, typename Out>
struct Form {
  void (*multiply)(const typename T::Number* rows, int64_t num_rows, const typename W::Number* columns,
                   int64_t num_columns, int64_t depth, Scales scales, typename Out::Number* out, int64_t out_stride);
  int64_t columns;
};

template <typename T, typename W, typename Out>
Form<T, W, Out> FormFor(int64_t num_rows) {
#ifdef MOE_JAX_TILES
  if constexpr (std::is_same_v<W, BFloat16>)
    if (num_rows >= kTiled && TilesAllowed()) return {Tiled<Out>, kTiledChunk};
#endif
  if (num_rows >= kMany) return {Many<T, W, Out>, kManyChunk};
  return {Few<T, W, Out>, kFewChunk};
}

// `scales` are those of the first matrix of the stack; each has `scales_of_matrix` of them.
template <typename T, typename W, typename Out>
ffi::Error Multiply(ffi::ThreadPool& pool, const ffi::AnyBuffer& rows, const ffi::AnyBuffer& weights,
                    const ffi::Buffer<ffi::S32>& sizes, int64_t layer, ffi::Result<ffi::AnyBuffer>& out,
                    const Scales& scales = {}, int64_t scales_of_matrix = 0) {
  const int64_t num_experts = sizes.element_count();
  const int32_t* group_sizes = sizes.typed_data();
  const int64_t num_rows = rows.dimensions()[0], depth = rows.dimensions()[1];
  const int64_t num_columns = out->dimensions()[1];
  const auto* rows_data = static_cast<const typename T::Number*>(rows.untyped_data());
  const auto* stack = static_cast<const typename W::Number*>(weights.untyped_data());
  auto* out_data = static_cast<typename Out::Number*>(out->untyped_data());

  auto pieces = std::make_shared<std::vector<Piece>>();
  int64_t first = 0;
  for (int64_t expert = 0; expert < num_experts; expert++) {
    const int64_t last = std::min<int64_t>(num_rows, first + std::max(0, group_sizes[expert]));
    for (int64_t row = first; row < last; row += kPanel) {
      const int64_t taken = std::min(kPanel, last - row), chunk = FormFor<T, W, Out>(taken).columns;
      for (int64_t column = 0; column < num_columns; column += chunk)
        pieces->push_back({row, taken, expert, column, std::min(chunk, num_columns - column)});
    }
    first = last;
  }
  std::memset(out_data + first * num_columns, 0, (num_rows - first) * num_columns * sizeof(*out_data));

  RunPieces(pool, pieces->size(), [=](int64_t i) {
    const Piece& piece = (*pieces)[i];
    const int64_t matrix = layer * num_experts + piece.expert;
    const auto* some_rows = rows_data + piece.first_row * depth;
    const auto* columns = stack + (matrix * num_columns + piece.first_column) * depth;
    auto* to = out_data + piece.first_row * num_columns + piece.first_column;
    Scales own = scales;
    own.first = piece.first_column;
    if (!std::is_same_v<T, W>) own.matrix += matrix * scales_of_matrix;
    FormFor<T, W, Out>(piece.num_rows)
        .multiply(some_rows, piece.num_rows, columns, piece.num_columns, depth, own, to, num_columns);
  });
  return ffi::Error::Success();
}

bool HasLayer(const ffi::AnyBuffer& weights, int64_t layer) { return layer >= 0 && layer < weights.dimensions()[0]; }

ffi::Error GroupedMatmul(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::AnyBuffer weights,
                         ffi::Buffer<ffi::S32> group_sizes, ffi::Buffer<ffi::S32> layer,
                         ffi::Result<ffi::AnyBuffer> out) {
  const int64_t at = layer.typed_data()[0];
  if (!HasLayer(weights, at)) return ffi::Error::InvalidArgument("grouped_matmul: no such layer");
  const bool is_float32 = out->element_type() == ffi::F32;
  if (!is_float32 && out->element_type() != rows.element_type()) {
    return ffi::Error::InvalidArgument("grouped_matmul: expected an output of float32, or of the type of the rows");
  }
  switch (rows.element_type()) {
    case ffi::F32:
      return Multiply<Float32, Float32, Float32>(pool, rows, weights, group_sizes, at, out);
    case ffi::F16:
      return is_float32 ? Multiply<Float16, Float16, Float32>(pool, rows, weights, group_sizes, at, out)
                        : Multiply<Float16, Float16, Float16>(pool, rows, weights, group_sizes, at, out);
    case ffi::BF16:
      return is_float32 ? Multiply<BFloat16, BFloat16, Float32>(pool, rows, weights, group_sizes, at, out)
                        : Multiply<BFloat16, BFloat16, BFloat16>(pool, rows, weights, group_sizes, at, out);
    default:
      return ffi::Error::InvalidArgument("grouped_matmul: expected float32, float16 or bfloat16");
  }
}

using ScalesOfBlocks = ffi::Buffer<ffi::F32, 4>;

// Weights in eight bits [L, E, F, D] with a scale for each block [L, E, blocks of F, blocks of D].
ffi::Error QuantizedMatmul(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::AnyBuffer weights,
                           ScalesOfBlocks scale, ffi::Buffer<ffi::S32> group_sizes,
                           ffi::Buffer<ffi::S32> layer, ffi::Result<ffi::AnyBuffer> out) {
  const int64_t at = layer.typed_data()[0];
  if (!HasLayer(weights, at)) return ffi::Error::InvalidArgument("grouped_matmul: no such layer");
  const auto sizes = weights.dimensions(), blocks = scale.dimensions();
  const Scales scales = {scale.typed_data(), sizes[2] / blocks[2], sizes[3] / blocks[3], blocks[3]};
  const auto run = [&](auto rows_of, auto weights_of) {
    using T = decltype(rows_of);
    using W = decltype(weights_of);
    return Multiply<T, W, T>(pool, rows, weights, group_sizes, at, out, scales, blocks[2] * blocks[3]);
  };
  const bool is_int8 = weights.element_type() == ffi::S8;
  switch (rows.element_type()) {
    case ffi::F32:
      return is_int8 ? run(Float32(), Int8()) : run(Float32(), Float8());
    case ffi::F16:
      return is_int8 ? run(Float16(), Int8()) : run(Float16(), Float8());
    case ffi::BF16:
      return is_int8 ? run(BFloat16(), Int8()) : run(BFloat16(), Float8());
    default:
      return ffi::Error::InvalidArgument("grouped_matmul: expected rows of float32, float16 or bfloat16");
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_jax_quantized_matmul, QuantizedMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ScalesOfBlocks>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());
