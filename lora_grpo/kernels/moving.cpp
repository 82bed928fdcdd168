// An adapter's tensors on their way: each is too small for a call of its own to be worth its price.

#include <atomic>

#include "vectors.h"

namespace {

// to = from * scale, rounded once; whether all of it is finite.
bool cast(const float* from, int64_t size, float scale, uint16_t* to) {
  constexpr uint16_t ALL = 0x7f80;  // the exponent of what is not finite
  Halves odd = {};
  int64_t i = 0;
  for (; i + WIDTH <= size; i += WIDTH) {
    const Halves halves = narrow(load<Floats>(from + i) * scale);
    odd |= (Halves)((halves & ALL) == ALL);
    store(to + i, halves);
  }
  bool finite = true;
  for (int lane = 0; lane < WIDTH; ++lane) finite &= !odd[lane];
  for (; i < size; ++i) {
    to[i] = narrow_one(from[i] * scale);
    finite &= (to[i] & ALL) != ALL;
  }
  return finite;
}

}  // namespace

// fp32 tensors, scaled, as bfloat16 end to end in `to`; 1 when all of it is finite there, else 0.
extern "C" int cast_all(int64_t count, const float* const* from, const int64_t* starts, const int64_t* sizes,
                        const float* scales, uint16_t* to, int threads) {
  std::atomic<int> finite{1};
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
  for (int64_t k = 0; k < count; ++k)
    if (!cast(from[k], sizes[k], scales[k], to + starts[k])) finite = 0;
  return finite;
}

extern "C" int copy_all(int64_t count, const char* const* from, char* const* to, const int64_t* sizes_bytes,
                        int threads) {
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
  for (int64_t k = 0; k < count; ++k) std::memcpy(to[k], from[k], sizes_bytes[k]);
  return 1;
}
