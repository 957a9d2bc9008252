// Copies numbers and checks in the same pass whether all are finite. Stores bypass the caches where the processor can
// do that: weights are larger than the caches, and ordinary stores would first fetch the lines that they overwrite.

#include <cstdint>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int kLineBytes = 64;

template <typename Number>
bool Copy(Number* to, const Number* from, int64_t count, Number exponent) {
  constexpr int64_t kLine = kLineBytes / sizeof(Number);
  typedef Number Line __attribute__((vector_size(kLineBytes)));
  typedef Number Loose __attribute__((vector_size(kLineBytes), aligned(1), may_alias));
  bool finite = true;
  int64_t i = 0;
  const auto one = [&] {
    to[i] = from[i];
    finite &= (from[i] & exponent) != exponent;
    i++;
  };
  while (i < count && reinterpret_cast<uintptr_t>(to + i) % kLineBytes) one();
  Line wrong = {};
  for (; i + kLine <= count; i += kLine) {
    const Line line = *reinterpret_cast<const Loose*>(from + i);
    wrong |= (Line)((line & exponent) == exponent);
#ifdef __AVX512F__
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), (__m512i)line);
#else
    *reinterpret_cast<Line*>(to + i) = line;
#endif
  }
  while (i < count) one();
#ifdef __AVX512F__
  _mm_sfence();
#endif
  for (int lane = 0; lane < kLine; lane++) finite &= !wrong[lane];
  return finite;
}

}  // namespace

extern "C" bool moe_jax_copy_16(uint16_t* to, const uint16_t* from, int64_t count, uint16_t exponent) {
  return Copy(to, from, count, exponent);
}

extern "C" bool moe_jax_copy_32(uint32_t* to, const uint32_t* from, int64_t count, uint32_t exponent) {
  return Copy(to, from, count, exponent);
}
