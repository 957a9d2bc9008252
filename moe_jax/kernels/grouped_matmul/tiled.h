// A piece of bfloat16 on a processor that multiplies tiles (Intel's AMX): 16 columns x 32 numbers along d, read in
// place, times 32 numbers x 16 rows, packed once for all columns of the piece. A tile of weights serves 16 rows at the
// cost of one, so up to about thirty rows a piece takes as long as reading its weights.

#ifndef MOE_JAX_KERNELS_GROUPED_MATMUL_TILED_H_
#define MOE_JAX_KERNELS_GROUPED_MATMUL_TILED_H_

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "few.h"
#include "native.h"

#define MOE_JAX_TILES

namespace {

constexpr int64_t kSide = 16;         // rows or columns of a tile: the lanes of AVX-512
constexpr int64_t kTileNumbers = 32;  // of a row or column along d

// Asks the operating system for the permission to use tiles; returns whether it is granted.
inline bool TilesAllowed() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM and its feature, in Linux's arch_prctl
  static const bool allowed = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return allowed;
}

// The shape of all tiles: 16 rows of 64 bytes each.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static const TileShapes kTileShapes;

// Makes the compiler finish writes before tiles read them: GCC does not know that tile loads read memory.
inline void WrittenForTiles() { asm volatile("" ::: "memory"); }

// Words of 16 packed rows, over all of d.
inline int64_t RowTile(int64_t depth) { return (depth + kTileNumbers - 1) / kTileNumbers * kSide; }

// Packs up to 16 rows, transposed: tiles one after another along d, padded with zeros.
inline void PackTiles(const uint16_t* rows, int64_t num_rows, int64_t depth, Words* to) {
  for (int64_t d = 0; d < depth; d += kTileNumbers, to += kSide) {
    for (int64_t r = 0; r < kSide; r++)
      to[r] = r < num_rows ? LoadWords<BFloat16>(rows + r * depth + d, depth - d) : Words{};
    Transpose(to);
  }
}

// One step along d: `columns` are kSide * `stride` bytes apart from tile to tile, `rows` are `row_tile` words apart.
template <int kColumnTiles, int kRowTiles>
inline void AddTiles(const uint16_t* columns, int64_t stride, const Words* rows, int64_t row_tile) {
  _tile_loadd(4, columns, stride);
  _tile_loadd(6, rows, 64);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kRowTiles == 2) {
    _tile_loadd(7, rows + row_tile, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (kColumnTiles == 2) {
    _tile_loadd(5, columns + kSide * stride / 2, stride);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kRowTiles == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

template <typename Out>
void StoreTile(Words sums[kSide], int64_t num_rows, typename Out::Number* out, int64_t out_stride) {
  Transpose(sums);  // they are stored column by column
  for (int64_t r = 0; r < num_rows; r++) Out::StoreLanes(out + r * out_stride, (Floats)sums[r]);
}

// kColumnTiles * 16 columns and up to kRowTiles * 16 rows, which are packed.
template <typename Out, int kColumnTiles, int kRowTiles>
void TiledBlock(const Words* rows, int64_t num_rows, const uint16_t* columns, int64_t depth,
                typename Out::Number* out, int64_t out_stride) {
  const int64_t row_tile = RowTile(depth);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int64_t d = 0;
  for (; d + kTileNumbers <= depth; d += kTileNumbers, rows += kSide)
    AddTiles<kColumnTiles, kRowTiles>(columns + d, 2 * depth, rows, row_tile);
  if (d < depth) {
    alignas(64) uint16_t last[kColumnTiles * kSide * kTileNumbers] = {};
    for (int64_t c = 0; c < kColumnTiles * kSide; c++)
      std::copy_n(columns + c * depth + d, depth - d, last + c * kTileNumbers);
    WrittenForTiles();
    AddTiles<kColumnTiles, kRowTiles>(last, 2 * kTileNumbers, rows, row_tile);
  }
  alignas(64) Words sums[4][kSide];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  for (int64_t c = 0; c < kColumnTiles; c++)
    for (int64_t r = 0; r < kRowTiles; r++)
      StoreTile<Out>(sums[2 * c + r], std::min(kSide, num_rows - r * kSide), out + r * kSide * out_stride + c * kSide,
                     out_stride);
}

template <typename Out, int kColumnTiles>
void TiledColumns(const Words* rows, int64_t num_rows, const uint16_t* columns, int64_t depth,
                  typename Out::Number* out, int64_t out_stride) {
  const int64_t row_tile = RowTile(depth);
  for (; num_rows > kSide; num_rows -= 2 * kSide, rows += 2 * row_tile, out += 2 * kSide * out_stride)
    TiledBlock<Out, kColumnTiles, 2>(rows, num_rows, columns, depth, out, out_stride);
  if (num_rows > 0) TiledBlock<Out, kColumnTiles, 1>(rows, num_rows, columns, depth, out, out_stride);
}

template <typename Out>
void Tiled(const uint16_t* rows, int64_t num_rows, const uint16_t* columns, int64_t num_columns, int64_t depth,
           Scales scales, typename Out::Number* out, int64_t out_stride) {
  struct alignas(64) Line {
    Words words;
  };
  static thread_local std::vector<Line> packed;
  const int64_t row_tile = RowTile(depth);
  packed.resize(std::max<size_t>(packed.size(), (num_rows + kSide - 1) / kSide * row_tile));
  Words* to = &packed.data()->words;
  for (int64_t r = 0; r < num_rows; r += kSide)
    PackTiles(rows + r * depth, std::min(kSide, num_rows - r), depth, to + r / kSide * row_tile);
  WrittenForTiles();
  _tile_loadconfig(&kTileShapes);
  for (; num_columns >= 2 * kSide; num_columns -= 2 * kSide, columns += 2 * kSide * depth, out += 2 * kSide)
    TiledColumns<Out, 2>(to, num_rows, columns, depth, out, out_stride);
  for (; num_columns >= kSide; num_columns -= kSide, columns += kSide * depth, out += kSide)
    TiledColumns<Out, 1>(to, num_rows, columns, depth, out, out_stride);
  _tile_release();
  Few<BFloat16, BFloat16, Out>(rows, num_rows, columns, num_columns, depth, scales, out, out_stride);
}

}  // namespace

#endif

#endif
