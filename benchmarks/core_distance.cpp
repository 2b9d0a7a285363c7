// How far two cores are from each other: the time of a cache line's way there and back, and the rate at which one core
// changes what the other has just written. Virtual cores may be moved, so that both change from second to second.
//
//     g++ -O3 -march=native -pthread benchmarks/core_distance.cpp -o core_distance && ./core_distance 30   # seconds

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Runs work on a core and waits for its end.
template <typename Work>
std::thread on_core(int core, Work work) {
  return std::thread([=] {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET(core, &cores);
    pthread_setaffinity_np(pthread_self(), sizeof cores, &cores);
    work();
  });
}

double round_trip() {
  constexpr int kTrips = 20000;
  alignas(128) static std::atomic<int> ball;
  double seconds = 0;
  ball = 0;
  std::thread other = on_core(1, [&] {
    for (int i = 0; i < kTrips; ++i) {
      while (ball.load() != 2 * i + 1) {
      }
      ball.store(2 * i + 2);
    }
  });
  on_core(0, [&] {
    const auto start = Clock::now();
    for (int i = 0; i < kTrips; ++i) {
      ball.store(2 * i + 1);
      while (ball.load() != 2 * i + 2) {
      }
    }
    seconds = seconds_since(start);
  }).join();
  other.join();
  return seconds / kTrips;
}

// Bytes a second of the best of some rounds, over a buffer that fits into a core's second cache.
double rate_of_taking_over() {
  static std::vector<float> data(1 << 18);
  double best = 1e9;
  for (int round = 0; round < 20; ++round) {
    on_core(1, [] { for (float& x : data) x += 1; }).join();
    on_core(0, [&] {
      const auto start = Clock::now();
      for (float& x : data) x += 1;
      const double seconds = seconds_since(start);
      if (seconds < best) best = seconds;
    }).join();
  }
  return static_cast<double>(data.size()) * sizeof(float) / best;
}

}  // namespace

int main(int count, char** arguments) {
  const int seconds = count > 1 ? atoi(arguments[1]) : 10;
  for (int i = 0; i < seconds; ++i) {
    printf("round trip %4.0f ns, taking over %5.1f GB/s\n", round_trip() * 1e9, rate_of_taking_over() * 1e-9);
    std::this_thread::sleep_for(std::chrono::seconds(1));
  }
}
