// y += scale * (x A^T) B^T for a few rows of bfloat16 or fp32, summed in fp32 and rounded once.
//
// A decode step of a 24-layer model makes two hundred of these products, of some kilobytes each. What a matrix library
// spends on getting ready for a product is several times what the product takes.
//
// Each row is computed by the same operations in the same order, whatever rows are beside it.

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t TOGETHER = WIDTH / 4;  // rows of A; their sums with four rows of x fit the registers

inline float sum(Floats floats) {
  float total = 0;
  for (int i = 0; i < WIDTH; ++i) total += floats[i];
  return total;
}

// Twice as many numbers as a vector is wide, in any order that is the same for all.
struct Pairs {
  Floats some, others;
};

inline Pairs widen_pairs(const uint16_t* from) {
  const Words words = load<Words>(from);
  return {(Floats)(words << 16), (Floats)(words & 0xffff0000u)};
}

inline Pairs widen_pairs(const float* from) { return {widen(from), widen(from + WIDTH)}; }

// h[n * ranks + m] = scale * x[n] . a[m], for N rows of x and M rows of A.
template <int N, int M, class T>
inline void dots(const T* x, int64_t stride, int64_t inputs, const T* a, float scale, float* h,
                 int64_t ranks) {
  Floats total[M][N] = {};
  const int64_t whole = inputs / (2 * WIDTH) * (2 * WIDTH);
  for (int64_t i = 0; i < whole; i += 2 * WIDTH) {
    Pairs weights[M];
    for (int m = 0; m < M; ++m) weights[m] = widen_pairs(a + m * inputs + i);
    for (int n = 0; n < N; ++n) {
      const Pairs values = widen_pairs(x + n * stride + i);
      for (int m = 0; m < M; ++m) total[m][n] += weights[m].some * values.some;
      for (int m = 0; m < M; ++m) total[m][n] += weights[m].others * values.others;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      float one = sum(total[m][n]);
      for (int64_t i = whole; i < inputs; ++i) one += widen_one(a[m * inputs + i]) * widen_one(x[n * stride + i]);
      h[n * ranks + m] = scale * one;
    }
}

template <int M, class T>
inline void all_dots(const T* x, int64_t stride, int64_t rows, int64_t inputs, const T* a, float scale,
                     float* h, int64_t ranks) {
  int64_t n = 0;
  for (; n + 4 <= rows; n += 4) dots<4, M>(x + n * stride, stride, inputs, a, scale, h + n * ranks, ranks);
  for (; n < rows; ++n) dots<1, M>(x + n * stride, stride, inputs, a, scale, h + n * ranks, ranks);
}

// `some` rows of A, TOGETHER or fewer.
template <class T>
inline void shrink(const T* x, int64_t stride, int64_t rows, int64_t inputs, const T* a, int64_t some,
                   float scale, float* h, int64_t ranks) {
  if (some == TOGETHER) return all_dots<TOGETHER>(x, stride, rows, inputs, a, scale, h, ranks);
  for (int64_t r = 0; r < some; ++r) all_dots<1>(x, stride, rows, inputs, a + r * inputs, scale, h + r, ranks);
}

// y[n] += h[n] . b for two vectors of outputs, which share a cache line, and N rows; b[r] and b[rank + r] hold those
// outputs' weights of rank r.
template <int N, class T>
inline void add(T* y, int64_t stride, const float* h, int64_t ranks, const Floats* b, int64_t rank) {
  Floats total[N][2];
  for (int n = 0; n < N; ++n)
    for (int o = 0; o < 2; ++o) total[n][o] = widen(y + n * stride + o * WIDTH);
  for (int64_t r = 0; r < rank; ++r)
    for (int n = 0; n < N; ++n)
      for (int o = 0; o < 2; ++o) total[n][o] += h[n * ranks + r] * b[o * rank + r];
  for (int n = 0; n < N; ++n)
    for (int o = 0; o < 2; ++o) put(y + n * stride + o * WIDTH, total[n][o]);
}

template <class T>
inline void expand(T* y, int64_t stride, int64_t rows, const float* h, int64_t ranks, const Floats* b,
                   int64_t rank) {
  constexpr int MOST = WIDTH / 2;
  int64_t n = 0;
  for (; n + MOST <= rows; n += MOST) add<MOST>(y + n * stride, stride, h + n * ranks, ranks, b, rank);
  for (; n + 2 <= rows; n += 2) add<2>(y + n * stride, stride, h + n * ranks, ranks, b, rank);
  for (; n < rows; ++n) add<1>(y + n * stride, stride, h + n * ranks, ranks, b, rank);
}

// In each group of 2 * D lanes, the second half of `a` and the first half of `b` change places.
template <int D>
inline void exchange(Floats& a, Floats& b) {
  const Lanes second = (LANE & D) != 0, of_both = LANE + (second & int32_t(WIDTH - D));
  const Floats swapped = __builtin_shuffle(a, b, of_both);
  b = __builtin_shuffle(a, b, of_both + D);
  a = swapped;
}

template <int D>
inline void exchange_all(Floats* rows) {
  for (int i = 0; i < WIDTH; ++i)
    if (!(i & D)) exchange<D>(rows[i], rows[i + D]);
}

// As many rows of B as a vector is wide, each `rank` long, as to[r][row].
template <class T>
inline void transpose(const T* b, int64_t rank, Floats* to) {
  int64_t r = 0;
  for (; r + WIDTH <= rank; r += WIDTH) {
    for (int o = 0; o < WIDTH; ++o) to[r + o] = widen(b + o * rank + r);
#ifdef __AVX512F__
    exchange_all<8>(to + r);
#endif
    exchange_all<4>(to + r);
    exchange_all<2>(to + r);
    exchange_all<1>(to + r);
  }
  for (; r < rank; ++r)
    for (int o = 0; o < WIDTH; ++o) to[r][o] = widen_one(b[o * rank + r]);
}

// `count` slices of a fused layer, each with a dense A (rank, inputs) and a dense B (outputs[s], rank); y's columns are
// the slices' outputs in turn. Strides are in elements, from row to row.
template <class T>
int lora(T* y, int64_t y_stride, const T* x, int64_t x_stride, int64_t rows,
                         int64_t inputs, float scale, int threads, int64_t count, const T* const* a,
                         const T* const* b, int64_t rank, const int64_t* outputs) {
  static thread_local std::vector<float> room;
  const int64_t ranks = count * rank, groups = (rank + TOGETHER - 1) / TOGETHER;
  room.resize(rows * ranks);
  float* const h = room.data();
#pragma omp parallel num_threads(threads)
  {
    // Some rows of x at a time, and each thread its own rows of A for all of them: both stay in the cache.
    for (int64_t n = 0; n < rows; n += 8)
#pragma omp for schedule(static) nowait
      for (int64_t k = 0; k < count * groups; ++k) {
        const int64_t slice = k / groups, r = k % groups * TOGETHER;
        shrink(x + n * x_stride, x_stride, std::min<int64_t>(8, rows - n), inputs, a[slice] + r * inputs,
               std::min(rank - r, TOGETHER), scale, h + n * ranks + slice * rank + r, ranks);
      }
#pragma omp barrier
    std::vector<Floats> columns(2 * rank);
    T* target = y;
    for (int64_t slice = 0; slice < count; target += outputs[slice++]) {
      const float* own = h + slice * rank;
      const int64_t whole = outputs[slice] / (2 * WIDTH) * (2 * WIDTH);
#pragma omp for schedule(static) nowait
      for (int64_t o = 0; o < whole; o += 2 * WIDTH) {
        transpose(b[slice] + o * rank, rank, columns.data());
        transpose(b[slice] + (o + WIDTH) * rank, rank, columns.data() + rank);
        expand(target + o, y_stride, rows, own, ranks, columns.data(), rank);
      }
#pragma omp single nowait
      for (int64_t o = whole; o < outputs[slice]; ++o)
        for (int64_t n = 0; n < rows; ++n) {
          float total = widen_one(target[n * y_stride + o]);
          for (int64_t r = 0; r < rank; ++r) total += own[n * ranks + r] * widen_one(b[slice][o * rank + r]);
          put_one(target + n * y_stride + o, total);
        }
    }
  }
  return 1;
}

}  // namespace

#define LORA(NAME, T)                                                                                               \
  extern "C" int NAME(T* y, int64_t y_stride, const T* x, int64_t x_stride, int64_t rows, int64_t inputs,          \
                      float scale, int threads, int64_t count, const T* const* a, const T* const* b, int64_t rank, \
                      const int64_t* outputs) {                                                                     \
    return lora(y, y_stride, x, x_stride, rows, inputs, scale, threads, count, a, b, rank, outputs);                \
  }

LORA(lora_rows_bfloat16, uint16_t)
LORA(lora_rows_float32, float)
