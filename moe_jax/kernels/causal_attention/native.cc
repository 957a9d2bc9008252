// Causal attention for CPUs (flash attention: arXiv 2205.14135). Scores exist for one block of queries and one block of
// keys at a time; blocks that no query sees are skipped. The gradient recomputes the scores from the log-sum-exp of
// every query. Sums are float32, and their order does not depend on the threads.
//
// A piece of the forward pass is a row, a block of queries and up to kHeads query heads that read one key head. A piece
// of the gradient is a row and a key head, since all its queries add to the gradient of a key.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "native.h"
#include "softmax.h"
#include "tiles.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kHeads = 4;  // query heads in a piece of the forward pass
constexpr float kLog2E = 1.44269504f;

// Access to an array [B, T, heads, width]: `At` is the start of a head's row, `stride` the distance to the next.
template <typename Number>
struct Heads {
  Number* data;
  int64_t length, heads, width;

  template <typename Buffer>
  static Heads Of(Buffer& buffer) {
    const auto dimensions = buffer.dimensions();
    return {static_cast<Number*>(buffer.untyped_data()), static_cast<int64_t>(dimensions[1]),
            static_cast<int64_t>(dimensions[2]), static_cast<int64_t>(dimensions[3])};
  }
  int64_t stride() const { return heads * width; }
  Number* At(int64_t row, int64_t head, int64_t position) const {
    return data + ((row * length + position) * heads + head) * width;
  }
};

// The positions [start, end) of a row's queries, cut at the same positions as the blocks of keys: the last block of
// keys that a block of queries sees has a key for each of its queries.
struct Place {
  int64_t start, end;

  int64_t first_block() const { return start / kBlock; }
  int64_t end_block() const { return (end - 1) / kBlock + 1; }
  Span QueriesOf(int64_t block) const {
    const int64_t first = std::max(start, block * kBlock);
    return {first, std::min(end, (block + 1) * kBlock) - first};
  }
};

template <typename T>
ffi::Error Forward(ffi::ThreadPool& pool, ffi::AnyBuffer& query, ffi::AnyBuffer& key, ffi::AnyBuffer& value,
                   const int32_t* all_segments, const int32_t* starts, float scale, ffi::AnyBuffer& mixed,
                   float* log_sum_exp) {
  using Number = typename T::Number;
  const auto q = Heads<Number>::Of(query), k = Heads<Number>::Of(key), v = Heads<Number>::Of(value);
  const auto out = Heads<Number>::Of(mixed);
  const int64_t batch = query.dimensions()[0], length = q.length, key_width = q.width, value_width = v.width;
  const int64_t memory = k.length, of_kv_head = q.heads / k.heads, chunks = (of_kv_head + kHeads - 1) / kHeads;
  const auto place_of = [=](int64_t row) { return Place{starts[row], starts[row] + length}; };
  int64_t blocks = 0;  // of the row with the most
  for (int64_t b = 0; b < batch; b++)
    blocks = std::max(blocks, place_of(b).end_block() - place_of(b).first_block());
  const int64_t key_stride = Whole(key_width), value_stride = Whole(value_width);

  RunPieces(pool, batch * k.heads * chunks * blocks, [=](int64_t piece) {
    const int64_t chunk = piece / blocks % chunks, g = piece / (blocks * chunks) % k.heads;
    const int64_t b = piece / (blocks * chunks * k.heads);
    const Place place = place_of(b);
    const int64_t block = place.end_block() - 1 - piece % blocks;  // the longest first; others find keys in the caches
    if (block < place.first_block()) return;
    const int64_t first_head = g * of_kv_head + chunk * kHeads;
    const int64_t count = std::min(kHeads, of_kv_head - chunk * kHeads);
    const int32_t* segments = all_segments + b * memory;
    const Span queries = place.QueriesOf(block);
    const int64_t first_query = queries.first - place.start, lanes = Whole(queries.count);

    Room room(kBlock * (key_stride + value_stride + std::max(key_stride, value_stride) + kBlock +
                        count * (key_width + value_width)));
    float* query_rows = room.Take(kBlock * std::max(key_stride, value_stride));
    float* keys_rows = room.Take(kBlock * key_stride);
    float* values_rows = room.Take(kBlock * value_stride);
    float* scores = room.Take(kBlock * kBlock);
    float *turned_query[kHeads], *turned_mixed[kHeads];
    Softmax softmax[kHeads];
    for (int64_t h = 0; h < count; h++) {
      turned_query[h] = room.Take(kBlock * key_width);
      turned_mixed[h] = room.Take(kBlock * value_width);
      Widen<T>(q.At(b, first_head + h, first_query), q.stride(), queries.count, key_width, query_rows, key_stride);
      for (int64_t i = 0; i < queries.count * key_stride; i++) query_rows[i] *= scale * kLog2E;
      Turn(query_rows, key_stride, queries.count, key_width, turned_query[h], kBlock);
      std::fill_n(turned_mixed[h], kBlock * value_width, 0.0f);
    }

    for (int64_t j = block; j >= 0; j--) {  // every query sees itself, so its first scores are finite
      const Span keys = BlockOf(j, place.end);
      const Sight sight = See(segments, queries, keys);
      if (sight == Sight::kNothing) continue;
      Widen<T>(k.At(b, g, keys.first), k.stride(), keys.count, key_width, keys_rows, key_stride);
      Widen<T>(v.At(b, g, keys.first), v.stride(), keys.count, value_width, values_rows, value_stride);
      for (int64_t h = 0; h < count; h++) {
        Multiply<Left::kAsItIs, Out::kSet>(keys_rows, key_stride, keys.count, turned_query[h], kBlock, key_width,
                                           scores, kBlock, lanes);
        if (sight == Sight::kSome) Hide(segments, queries, keys, scores);
        softmax[h].Add(scores, keys.count, queries.count, turned_mixed[h], value_width);
        Multiply<Left::kTurned, Out::kAdded>(values_rows, value_stride, value_width, scores, kBlock, keys.count,
                                             turned_mixed[h], kBlock, lanes);
      }
    }

    float* mixed_rows = query_rows;
    for (int64_t h = 0; h < count; h++) {
      Turn(turned_mixed[h], kBlock, value_width, queries.count, mixed_rows, value_stride);
      for (int64_t i = 0; i < queries.count; i++) {
        Narrow<T>(mixed_rows + i * value_stride, 0, 1, value_width, 1 / softmax[h].sum[i],
                  out.At(b, first_head + h, first_query + i), 0);
        log_sum_exp[(b * q.heads + first_head + h) * length + first_query + i] = softmax[h].LogSumExp(i);
      }
    }
  });
  return ffi::Error::Success();
}

template <typename T>
ffi::Error Backward(ffi::ThreadPool& pool, ffi::AnyBuffer& query, ffi::AnyBuffer& key, ffi::AnyBuffer& value,
                    const int32_t* all_segments, const int32_t* starts, ffi::AnyBuffer& mixed,
                    const float* log_sum_exp, ffi::AnyBuffer& mixed_grad, float scale, ffi::AnyBuffer& query_grad,
                    ffi::AnyBuffer& key_grad, ffi::AnyBuffer& value_grad) {
  using Number = typename T::Number;
  const auto q = Heads<Number>::Of(query), k = Heads<Number>::Of(key), v = Heads<Number>::Of(value);
  const auto out = Heads<Number>::Of(mixed), d_out = Heads<Number>::Of(mixed_grad);
  const auto d_q = Heads<Number>::Of(query_grad), d_k = Heads<Number>::Of(key_grad);
  const auto d_v = Heads<Number>::Of(value_grad);
  const int64_t batch = query.dimensions()[0], length = q.length, key_width = q.width, value_width = v.width;
  const int64_t memory = k.length, of_kv_head = q.heads / k.heads, blocks = (memory + kBlock - 1) / kBlock;
  const int64_t key_stride = Whole(key_width), value_stride = Whole(value_width);

  RunPieces(pool, batch * k.heads, [=](int64_t piece) {
    const int64_t b = piece / k.heads, g = piece % k.heads;
    const Place place{starts[b], starts[b] + length};
    const int32_t* segments = all_segments + b * memory;
    Room room(kBlock * (2 * blocks * (key_stride + value_stride) + 2 * key_stride + value_stride + key_width +
                        value_width + 2 * kBlock));
    float* keys_rows = room.Take(blocks * kBlock * key_stride);
    float* values_rows = room.Take(blocks * kBlock * value_stride);
    float* d_keys = room.Take(blocks * kBlock * key_stride);
    float* d_values = room.Take(blocks * kBlock * value_stride);
    float* query_rows = room.Take(kBlock * key_stride);
    float* turned_query = room.Take(kBlock * key_width);
    float* d_query = room.Take(kBlock * key_stride);
    float* d_mixed = room.Take(kBlock * value_stride);
    float* turned_d_mixed = room.Take(kBlock * value_width);
    float* shares = room.Take(kBlock * kBlock);
    float* d_scores = room.Take(kBlock * kBlock);
    Widen<T>(k.At(b, g, 0), k.stride(), memory, key_width, keys_rows, key_stride);
    Widen<T>(v.At(b, g, 0), v.stride(), memory, value_width, values_rows, value_stride);
    std::fill_n(d_keys, memory * key_stride, 0.0f);
    std::fill_n(d_values, memory * value_stride, 0.0f);

    for (int64_t block = place.first_block(); block < place.end_block(); block++)
      for (int64_t h = g * of_kv_head; h < (g + 1) * of_kv_head; h++) {
        const Span queries = place.QueriesOf(block);
        const int64_t first_query = queries.first - place.start, lanes = Whole(queries.count);
        alignas(64) float of_query[kBlock] = {}, delta[kBlock] = {};  // log-sum-exp, and mixed times its gradient
        std::copy_n(log_sum_exp + (b * q.heads + h) * length + first_query, queries.count, of_query);
        // d_query also holds the scaled queries, before the sums
        Widen<T>(d_out.At(b, h, first_query), d_out.stride(), queries.count, value_width, d_mixed, value_stride);
        Turn(d_mixed, value_stride, queries.count, value_width, turned_d_mixed, kBlock);
        for (int64_t i = 0; i < queries.count; i++) {
          const Number* of_mixed = out.At(b, h, first_query + i);
          Floats sums = {};
          for (int64_t x = 0; x < value_width; x += kLanes)
            sums += WidenSome<T>(of_mixed + x, value_width - x) * At(d_mixed + i * value_stride + x);
          delta[i] = Sum(sums);
        }
        Widen<T>(q.At(b, h, first_query), q.stride(), queries.count, key_width, query_rows, key_stride);
        for (int64_t i = 0; i < queries.count * key_stride; i++) d_query[i] = query_rows[i] * (scale * kLog2E);
        Turn(d_query, key_stride, queries.count, key_width, turned_query, kBlock);
        std::fill_n(d_query, queries.count * key_stride, 0.0f);

        for (int64_t j = 0; j <= block; j++) {
          const Span keys = BlockOf(j, place.end);
          const Sight sight = See(segments, queries, keys);
          if (sight == Sight::kNothing) continue;
          const float* some_keys = keys_rows + keys.first * key_stride;
          const float* some_values = values_rows + keys.first * value_stride;
          Multiply<Left::kAsItIs, Out::kSet>(some_keys, key_stride, keys.count, turned_query, kBlock, key_width,
                                             shares, kBlock, lanes);
          if (sight == Sight::kSome) Hide(segments, queries, keys, shares);
          Multiply<Left::kAsItIs, Out::kSet>(some_values, value_stride, keys.count, turned_d_mixed, kBlock,
                                             value_width, d_scores, kBlock, lanes);
          for (int64_t at = 0; at < keys.count * kBlock; at += kBlock)
            for (int64_t lane = 0; lane < lanes; lane += kLanes) {
              Floats& share = At(shares + at + lane);
              share = Exp2(share - At(of_query + lane));
              At(d_scores + at + lane) = share * (At(d_scores + at + lane) - At(delta + lane));
            }
          Multiply<Left::kAsItIs, Out::kAdded>(shares, kBlock, keys.count, d_mixed, value_stride, queries.count,
                                               d_values + keys.first * value_stride, value_stride, value_stride);
          Multiply<Left::kAsItIs, Out::kAdded>(d_scores, kBlock, keys.count, query_rows, key_stride, queries.count,
                                               d_keys + keys.first * key_stride, key_stride, key_stride);
          Multiply<Left::kTurned, Out::kAdded>(d_scores, kBlock, queries.count, some_keys, key_stride, keys.count,
                                               d_query, key_stride, key_stride);
        }
        Narrow<T>(d_query, key_stride, queries.count, key_width, scale, d_q.At(b, h, first_query), d_q.stride());
      }
    Narrow<T>(d_keys, key_stride, memory, key_width, scale, d_k.At(b, g, 0), d_k.stride());
    Narrow<T>(d_values, value_stride, memory, value_width, 1, d_v.At(b, g, 0), d_v.stride());
  });
  return ffi::Error::Success();
}

template <typename Run>
ffi::Error ByDtype(ffi::DataType dtype, const Run& run) {
  switch (dtype) {
    case ffi::F32:
      return run(Float32());
    case ffi::F16:
      return run(Float16());
    case ffi::BF16:
      return run(BFloat16());
    default:
      return ffi::Error::InvalidArgument("causal_attention: expected float32, float16 or bfloat16");
  }
}

ffi::Error CausalAttention(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                           ffi::Buffer<ffi::S32> segments, ffi::Buffer<ffi::S32> starts, float scale,
                           ffi::Result<ffi::AnyBuffer> mixed, ffi::Result<ffi::Buffer<ffi::F32>> log_sum_exp) {
  const auto run = [&](auto dtype) {
    return Forward<decltype(dtype)>(pool, query, key, value, segments.typed_data(), starts.typed_data(), scale, *mixed,
                                    log_sum_exp->typed_data());
  };
  return ByDtype(query.element_type(), run);
}

ffi::Error CausalAttentionGradient(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key,
                                   ffi::AnyBuffer value, ffi::Buffer<ffi::S32> segments,
                                   ffi::Buffer<ffi::S32> starts, ffi::AnyBuffer mixed,
                                   ffi::Buffer<ffi::F32> log_sum_exp, ffi::AnyBuffer mixed_grad, float scale,
                                   ffi::Result<ffi::AnyBuffer> query_grad, ffi::Result<ffi::AnyBuffer> key_grad,
                                   ffi::Result<ffi::AnyBuffer> value_grad) {
  const auto run = [&](auto dtype) {
    return Backward<decltype(dtype)>(pool, query, key, value, segments.typed_data(), starts.typed_data(), mixed,
                                     log_sum_exp.typed_data(), mixed_grad, scale, *query_grad, *key_grad, *value_grad);
  };
  return ByDtype(query.element_type(), run);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_jax_causal_attention, CausalAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<float>("scale")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_jax_causal_attention_gradient, CausalAttentionGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
