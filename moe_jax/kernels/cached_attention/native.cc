// Attention of one query per row against a cache, for CPUs: the new key and value are written into the cache, which is
// neither copied nor converted; it is read in place, once for up to kHeads query heads.
//
// A piece of work is a row, a key head, and up to kHeads query heads that read it. Sums are float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "native.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kHeads = 8;       // query heads in a piece
constexpr int64_t kPositions = 64;  // read at once, to stay in the nearest caches for all heads
constexpr int kVectors = 8;         // of a value, summed at once

template <typename T>
float Dot(const float* query, const typename T::Number* key, int64_t channels) {
  Floats even = {}, odd = {};
  int64_t a = 0;
  for (; a + 2 * kLanes <= channels; a += 2 * kLanes) {
    even += Float32::Widen(query + a) * T::Widen(key + a);
    odd += Float32::Widen(query + a + kLanes) * T::Widen(key + a + kLanes);
  }
  for (; a < channels; a += kLanes)
    even += WidenSome<Float32>(query + a, channels - a) * WidenSome<T>(key + a, channels - a);
  return Sum(even + odd);
}

// mixed[x] += share[m] * value[m][x], for kCount whole vectors of x.
template <typename T, int kCount>
void Mix(const float* share, int64_t positions, const typename T::Number* value, int64_t stride, float* mixed) {
  Floats sums[kCount];
#pragma GCC unroll 8
  for (int v = 0; v < kCount; v++) sums[v] = Float32::Widen(mixed + v * kLanes);
  for (int64_t m = 0; m < positions; m++, value += stride)
#pragma GCC unroll 8
    for (int v = 0; v < kCount; v++) sums[v] += share[m] * T::Widen(value + v * kLanes);
#pragma GCC unroll 8
  for (int v = 0; v < kCount; v++) std::memcpy(mixed + v * kLanes, &sums[v], sizeof(Floats));
}

template <typename T>
void MixAll(const float* share, int64_t positions, const typename T::Number* value, int64_t stride, int64_t channels,
            float* mixed) {
  int64_t x = 0;
  for (; x + kVectors * kLanes <= channels; x += kVectors * kLanes)
    Mix<T, kVectors>(share, positions, value + x, stride, mixed + x);
  for (; x + kLanes <= channels; x += kLanes) Mix<T, 1>(share, positions, value + x, stride, mixed + x);
  for (int64_t m = 0; x < channels && m < positions; m++) {
    const Floats some = WidenSome<T>(value + m * stride + x, channels - x);
    for (int64_t i = 0; x + i < channels; i++) mixed[x + i] += share[m] * some[i];
  }
}

void Softmax(float* score, int64_t positions) {
  const float most = *std::max_element(score, score + positions);
  float sum = 0;
  for (int64_t m = 0; m < positions; m++) sum += score[m] = std::exp(score[m] - most);
  for (int64_t m = 0; m < positions; m++) score[m] /= sum;
}

template <typename T>
ffi::Error Attend(ffi::ThreadPool& pool, const ffi::Buffer<ffi::F32>& query, const ffi::AnyBuffer& new_key,
                  const ffi::AnyBuffer& new_value, const ffi::AnyBuffer& key, const ffi::AnyBuffer& value,
                  int64_t layer, const ffi::Buffer<ffi::S32>& position, float scale,
                  ffi::Result<ffi::Buffer<ffi::F32>>& mixed) {
  using Number = typename T::Number;
  const int64_t batch = query.dimensions()[0], heads = query.dimensions()[1], key_channels = query.dimensions()[2];
  const int64_t memory = key.dimensions()[2], kv_heads = key.dimensions()[3];
  const int64_t kept_channels = value.dimensions()[4], value_channels = mixed->dimensions()[2];
  const int64_t of_kv_head = heads / kv_heads, chunks = (of_kv_head + kHeads - 1) / kHeads;
  const float* queries = query.typed_data();
  const int32_t* positions = position.typed_data();
  float* mixed_data = mixed->typed_data();

  // the cache of one layer: [row, position, head, channel]
  const auto layer_of = [=](const ffi::AnyBuffer& cache, int64_t channels) {
    return static_cast<Number*>(cache.untyped_data()) + layer * batch * memory * kv_heads * channels;
  };
  Number* keys = layer_of(key, key_channels);
  Number* values = layer_of(value, kept_channels);
  const auto write = [=](const ffi::AnyBuffer& from, Number* cache, int64_t channels) {
    const int64_t size = kv_heads * channels;
    for (int64_t b = 0; b < batch; b++)
      if (positions[b] >= 0 && positions[b] < memory)
        std::memcpy(cache + (b * memory + positions[b]) * size,
                    static_cast<const Number*>(from.untyped_data()) + b * size, size * sizeof(Number));
  };
  write(new_key, keys, key_channels);
  write(new_value, values, kept_channels);

  RunPieces(pool, batch * kv_heads * chunks, [=](int64_t piece) {
    const int64_t b = piece / (kv_heads * chunks), g = piece / chunks % kv_heads, chunk = piece % chunks;
    const int64_t first = g * of_kv_head + chunk * kHeads;
    const int64_t count = std::min(kHeads, of_kv_head - chunk * kHeads);
    const int64_t seen = std::clamp<int64_t>(positions[b] + 1, 1, memory);
    const int64_t key_stride = kv_heads * key_channels, value_stride = kv_heads * kept_channels;
    const Number* key_of = keys + b * memory * key_stride + g * key_channels;
    const Number* value_of = kept_channels ? values + b * memory * value_stride + g * kept_channels : key_of;
    const int64_t stride = kept_channels ? value_stride : key_stride;
    const float* query_of = queries + (b * heads + first) * key_channels;
    float* mixed_of = mixed_data + (b * heads + first) * value_channels;
    static thread_local std::vector<float> scores;
    scores.resize(count * seen);
    std::fill_n(mixed_of, count * value_channels, 0.0f);
    for (int64_t begin = 0; begin < seen; begin += kPositions)
      for (int64_t h = 0; h < count; h++)
        for (int64_t m = begin; m < std::min(seen, begin + kPositions); m++)
          scores[h * seen + m] = scale * Dot<T>(query_of + h * key_channels, key_of + m * key_stride, key_channels);
    for (int64_t h = 0; h < count; h++) Softmax(&scores[h * seen], seen);
    for (int64_t begin = 0; begin < seen; begin += kPositions)
      for (int64_t h = 0; h < count; h++)
        MixAll<T>(&scores[h * seen + begin], std::min(kPositions, seen - begin), value_of + begin * stride, stride,
                  value_channels, mixed_of + h * value_channels);
  });
  return ffi::Error::Success();
}

ffi::Error CachedAttention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::AnyBuffer new_key,
                           ffi::AnyBuffer new_value, ffi::AnyBuffer key, ffi::AnyBuffer value,
                           ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> position, float scale,
                           ffi::Result<ffi::Buffer<ffi::F32>> mixed, ffi::Result<ffi::AnyBuffer> key_after,
                           ffi::Result<ffi::AnyBuffer> value_after) {
  if (key_after->untyped_data() != key.untyped_data() ||
      (value.element_count() && value_after->untyped_data() != value.untyped_data()))
    return ffi::Error::Internal("cached_attention: expected caches that are updated in place, got copies");
  const int64_t at = layer.typed_data()[0];
  if (at < 0 || at >= key.dimensions()[0]) return ffi::Error::InvalidArgument("cached_attention: no such layer");
  switch (key.element_type()) {
    case ffi::F32:
      return Attend<Float32>(pool, query, new_key, new_value, key, value, at, position, scale, mixed);
    case ffi::F16:
      return Attend<Float16>(pool, query, new_key, new_value, key, value, at, position, scale, mixed);
    case ffi::BF16:
      return Attend<BFloat16>(pool, query, new_key, new_value, key, value, at, position, scale, mixed);
    default:
      return ffi::Error::InvalidArgument("cached_attention: expected float32, float16 or bfloat16");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_jax_cached_attention, CachedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<float>("scale")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
