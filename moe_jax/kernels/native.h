// Shared by the C++ kernels for CPUs: vectors of three dtypes, and running pieces of work on a thread pool.

#ifndef MOE_JAX_KERNELS_NATIVE_H_
#define MOE_JAX_KERNELS_NATIVE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));
typedef _Float16 Float16s __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

// Reading, multiplying and storing numbers of one dtype.
//
// `Widen` reads kLanes numbers as float32. `Load` reads kStep numbers along the summed axis, in the cheapest form and
// order, and `Add` adds the products of two such packs to kLanes partial sums. `LoadWords` reads kLanes words of 32
// bits, of kPerWord numbers each, in order, and `AddWords` adds the products of words. `Store` rounds one sum;
// `StoreLanes`, only for outputs of products by tiles, rounds kLanes sums.
struct Float32 {
  using Number = float;
  using Pack = Floats;
  static constexpr int kStep = kLanes, kPerWord = 1;
  static Floats Widen(const Number* from) { return *reinterpret_cast<const Floats*>(from); }
  static Pack Load(const Number* from) { return Widen(from); }
  static void Add(Floats& sums, const Pack& a, const Pack& b) { sums += a * b; }
  static Words LoadWords(const Number* from) { return (Words)Widen(from); }
  static void AddWords(Floats& sums, const Words& a, const Words& b) { sums += (Floats)a * (Floats)b; }
  static void Store(Number* to, float x) { *to = x; }
  static void StoreLanes(Number* to, const Floats& x) { *reinterpret_cast<Floats*>(to) = x; }
};

struct Float16 {
  using Number = _Float16;
  using Pack = Floats;
  static constexpr int kStep = kLanes, kPerWord = 1;
  static Floats Widen(const Number* from) {
#ifdef __AVX512F__
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
    return __builtin_convertvector(*reinterpret_cast<const Float16s*>(from), Floats);
  }
  static Pack Load(const Number* from) { return Widen(from); }
  static void Add(Floats& sums, const Pack& a, const Pack& b) { sums += a * b; }
  static Words LoadWords(const Number* from) { return (Words)Widen(from); }
  static void AddWords(Floats& sums, const Words& a, const Words& b) { sums += (Floats)a * (Floats)b; }
  static void Store(Number* to, float x) { *to = static_cast<_Float16>(x); }
};

struct BFloat16 {
  using Number = uint16_t;
  static constexpr int kStep = 2 * kLanes;
  static Floats Widen(const Number* from) {
    return (Floats)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16);
  }
#ifdef __AVX512BF16__
  using Pack = __m512bh;
  static constexpr int kPerWord = 2;
  static Pack Load(const Number* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static void Add(Floats& sums, const Pack& a, const Pack& b) {
    sums = (Floats)_mm512_dpbf16_ps((__m512)sums, a, b);
  }
  static Words LoadWords(const Number* from) { return *reinterpret_cast<const Words*>(from); }
  static void AddWords(Floats& sums, const Words& a, const Words& b) { Add(sums, (Pack)a, (Pack)b); }
#else
  struct Pack {
    Floats even, odd;
  };
  static constexpr int kPerWord = 1;
  static Pack Load(const Number* from) {
    const Words both = *reinterpret_cast<const Words*>(from);
    return {(Floats)(both << 16), (Floats)(both & 0xffff0000)};
  }
  static void Add(Floats& sums, const Pack& a, const Pack& b) {
    sums += a.even * b.even;
    sums += a.odd * b.odd;
  }
  static Words LoadWords(const Number* from) { return (Words)Widen(from); }
  static void AddWords(Floats& sums, const Words& a, const Words& b) { sums += (Floats)a * (Floats)b; }
#endif
  static void Store(Number* to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    *to = is_nan ? (bits >> 16) | 64 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  }
  static void StoreLanes(Number* to, const Floats& x) {
    const Words bits = (Words)x, is_nan = (Words)((bits & 0x7fffffff) > 0x7f800000);
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words stored = (is_nan & ((bits >> 16) | 64)) | (~is_nan & rounded);
    *reinterpret_cast<Halves*>(to) = __builtin_convertvector(stored, Halves);
  }
};

// Eight-bit numbers, which are exact in every dtype of rows.
//
// `FromWords` converts the lowest bytes of kLanes words. `Halve` converts 2 * kLanes numbers to bfloat16, in order.
struct Int8 {
  using Number = int8_t;
  static Floats FromWords(const Words& bytes) {
    return __builtin_convertvector((Integers)(bytes << 24) >> 24, Floats);
  }
#ifdef __AVX512BF16__
  static __m512bh Halve(const Number* from) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(from + kLanes))));
    return _mm512_cvtne2ps_pbh(high, low);
  }
#endif
};

// float8_e4m3fn: four bits of exponent with a bias of 7, three of mantissa. NaN is not expected.
struct Float8 {
  using Number = uint8_t;
  static Floats FromWords(const Words& bytes) {
    // Exponent 0 means multiples of 2^-9: those are 2^-6 (1 + m / 8) less 2^-6. No step has a denormal number.
    const Words is_small = (Words)((bytes & 0x78) == 0);
    const Words bits = ((bytes & 0x7f) << 20) + (120 << 23) + (is_small & (1 << 23));
    const Floats magnitude = (Floats)bits - (Floats)(is_small & (121 << 23));
    return (Floats)((Words)magnitude | ((bytes & 0x80) << 24));
  }
#ifdef __AVX512BF16__
  struct Table {
    alignas(64) uint16_t bfloat16[128] = {};
    constexpr Table() {
      for (int exponent = 1; exponent < 16; exponent++)
        for (int mantissa = 0; mantissa < 8; mantissa++)
          bfloat16[8 * exponent + mantissa] = (exponent + 120) << 7 | mantissa << 4;
      const int leading[8] = {0, 0, 1, 1, 2, 2, 2, 2};  // m 2^-9 = 2^(leading - 9) (1 + ..)
      for (int m = 1; m < 8; m++)
        bfloat16[m] = (127 - 9 + leading[m]) << 7 | (m - (1 << leading[m])) << (7 - leading[m]);
    }
  };
  static __m512bh Halve(const Number* from) {
    static constexpr Table table;
    const auto at = [](int entry) { return _mm512_load_si512(table.bfloat16 + entry); };
    const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
    const __m512i low = _mm512_permutex2var_epi16(at(0), bytes, at(32));
    const __m512i high = _mm512_permutex2var_epi16(at(64), bytes, at(96));
    const __mmask32 is_high = _mm512_test_epi16_mask(bytes, _mm512_set1_epi16(0x40));
    const __m512i magnitude = _mm512_mask_blend_epi16(is_high, low, high);
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(bytes, 8), _mm512_set1_epi16((short)0x8000));
    return (__m512bh)_mm512_or_si512(magnitude, sign);
  }
#endif
};

// Numbers of W, converted to a pack or to words of T where they are not T already.
template <typename W>
Floats WidenBytes(const typename W::Number* from) {
  return W::FromWords(__builtin_convertvector(*reinterpret_cast<const Bytes*>(from), Words));
}

template <typename T, typename W>
typename T::Pack LoadAs(const typename W::Number* from) {
  if constexpr (std::is_same_v<T, W>) {
    return T::Load(from);
  } else if constexpr (T::kStep == kLanes) {
    return WidenBytes<W>(from);
  } else {
#ifdef __AVX512BF16__
    return W::Halve(from);
#else
    const Words both = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words);
    return {W::FromWords(both & 0xff), W::FromWords(both >> 8)};
#endif
  }
}

template <typename T, typename W>
Words LoadWordsAs(const typename W::Number* from) {
  if constexpr (std::is_same_v<T, W>) return T::LoadWords(from);
#ifdef __AVX512BF16__
  else if constexpr (T::kPerWord == 2) return (Words)W::Halve(from);
#endif
  else return (Words)WidenBytes<W>(from);
}

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

// `count` numbers, padded with zeros to kRoom, so that a load of kRoom numbers is safe.
template <typename T, int kRoom>
struct Padded {
  typename T::Number numbers[kRoom] = {};
  Padded(const typename T::Number* from, int64_t count) { std::memcpy(numbers, from, count * sizeof(*from)); }
};

template <typename T>
Floats WidenSome(const typename T::Number* from, int64_t count) {
  return count >= kLanes ? T::Widen(from) : T::Widen(Padded<T, kLanes>(from, count).numbers);
}

template <typename T, typename W = T>
Words LoadWords(const typename W::Number* from, int64_t count) {
  constexpr int kNumbers = kLanes * T::kPerWord;
  if (count >= kNumbers) return LoadWordsAs<T, W>(from);
  return LoadWordsAs<T, W>(Padded<W, kNumbers>(from, count).numbers);
}

// The lanes of two concatenated vectors that make up the new two when blocks of `kSize` lanes are swapped.
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

// x[i][j] becomes x[j][i]: swaps blocks of 1 lane, then of 2, and so on.
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

// Runs `piece(i)` for every i below `count`, on the calling thread and on XLA's own pool, which share one counter.
// `piece` is copied: a pool thread that starts after the last piece was taken finds none left, but still holds a copy.
template <typename Piece>
void RunPieces(xla::ffi::ThreadPool& pool, int64_t count, Piece piece) {
  struct Work {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto work = std::make_shared<Work>();
  auto run = [=] {
    for (int64_t i = work->next++; i < count; i = work->next++) {
      piece(i);
      work->done++;
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t helper = 0; helper < helpers; helper++) pool.Schedule(std::function<void()>(run));
  run();
  while (work->done < count) std::this_thread::yield();
}

}  // namespace

#endif
