// The queue of the batcher under many threads: none lost, none answered twice, results right, memory flat.
//
//   queue_stress [requests] [threads] [seed]
//
// The engine is written here and has no tensors, so that the sanitizers see all of what runs: a request's
// state goes through a recurrence whose end is known. Some requests are cancelled, have too little time,
// become non-finite, or meet an engine that throws. Prints one line and exits with 0, or says what is wrong
// and exits with 1.
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <thread>

#include "../step_queue.h"

namespace {

using clora::Fault;
using clora::Outcome;
using clora::StepQueue;
using clora::Work;

constexpr int WIDTH = 64;

std::atomic<int64_t> faults{0}, alive{0};

void fail(const std::string& what) {
  if (faults++ < 10) std::fprintf(stderr, "queue_stress: %s\n", what.c_str());
}

// What a request's values are after `step`: each request is itself, whatever its batch.
float next(float value, int step, int64_t bucket) {
  return 0.5F * value + static_cast<float>(step) - 0.25F * static_cast<float>(bucket);
}

struct Answers {
  std::atomic<int64_t> done{0}, cancelled{0}, expired{0}, failed{0}, non_finite{0};
};

struct Sum : Work {
  Sum(Answers& answers, float start) : answers(answers), start(start), values(WIDTH, start) { ++alive; }
  ~Sum() override { --alive; }

  void finish(Outcome outcome, const std::string& message) noexcept override {
    if (++times != 1) fail("answered twice");
    if ((outcome == Outcome::done) != message.empty())
      fail("message '" + message + "' for the wrong outcome");
    if (outcome == Outcome::done) check();
    if (on_answer) on_answer(outcome);
    counter(outcome)++;
  }

  void check() {
    float wanted = start;
    for (int k = 0; k < num_steps; ++k) wanted = next(wanted, k, bucket);
    for (const float value : values) {
      if (value != wanted)
        return fail("a result is " + std::to_string(value) + ", not " + std::to_string(wanted));
    }
  }

  std::atomic<int64_t>& counter(Outcome outcome) {
    switch (outcome) {
      case Outcome::done:
        return answers.done;
      case Outcome::cancelled:
        return answers.cancelled;
      case Outcome::expired:
        return answers.expired;
      case Outcome::non_finite:
        return answers.non_finite;
      default:
        return answers.failed;
    }
  }

  Answers& answers;
  float start;
  std::vector<float> values;
  int times = 0;
  int broken_at = -1;  // the step at which its velocity is not finite
  std::function<void(Outcome)> on_answer;
};

struct Engine {
  size_t max_batch;
  int64_t calls = 0;

  std::vector<std::optional<Fault>> operator()(const std::vector<Work*>& batch) {
    if (batch.empty() || batch.size() > max_batch) fail("a batch of " + std::to_string(batch.size()));
    if (++calls % 97 == 0) throw std::runtime_error("the engine failed");
    if (calls % 13 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
    std::vector<std::optional<Fault>> found(batch.size());
    for (size_t i = 0; i < batch.size(); ++i) {
      auto& sum = static_cast<Sum&>(*batch[i]);
      if (sum.bucket != batch[0]->bucket) fail("a batch of two buckets");
      if (i > 0 && sum.ticket <= batch[i - 1]->ticket) fail("a batch that is not by age");
      if (sum.times != 0) fail("a step after the answer");
      for (float& value : sum.values) value = next(value, sum.step, sum.bucket);
      if (sum.step == sum.broken_at) found[i] = Fault{Outcome::non_finite, "not finite"};
    }
    return found;
  }
};

int64_t resident_kilobytes() {
  std::ifstream file("/proc/self/statm");
  int64_t total = 0, resident = 0;
  file >> total >> resident;
  return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

struct Client {
  std::atomic<int64_t>& rejected;
  int64_t submitted = 0;

  void run(StepQueue& queue, Answers& answers, int64_t count, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<uint64_t> tickets;
    const auto dice = [&](int sides) { return static_cast<int>(random() % sides); };
    for (int64_t i = 0; i < count; ++i) {
      auto sum = std::make_unique<Sum>(answers, static_cast<float>(dice(1000)));
      sum->bucket = dice(3);
      sum->effect = "effect " + std::to_string(dice(50));
      sum->num_steps = 1 + dice(8);
      if (dice(10) == 0) sum->deadline = clora::Clock::now() + std::chrono::microseconds(dice(300));
      if (dice(20) == 0) sum->broken_at = dice(8);
      // An answer may itself ask the queue.
      if (dice(10) == 0) sum->on_answer = [&queue](Outcome) { (void)queue.stats(); };
      try {
        tickets.push_back(queue.submit(std::move(sum)));
        ++submitted;
      } catch (const clora::QueueFull&) {
        ++rejected;
        --i;  // try again
        std::this_thread::sleep_for(std::chrono::microseconds(50));
        continue;
      }
      // One of late, which may still be there, or any, which may be gone.
      if (dice(5) == 0) queue.cancel(tickets.back());
      if (dice(5) == 0) queue.cancel(tickets[random() % tickets.size()]);
      if (dice(50) == 0) std::this_thread::sleep_for(std::chrono::microseconds(dice(100)));
    }
  }
};

void check_counts(const clora::Stats& stats, const Answers& answers, int64_t submitted, int64_t rejected) {
  const int64_t total =
      answers.done + answers.cancelled + answers.expired + answers.failed + answers.non_finite;
  if (total != submitted) {
    fail(std::to_string(submitted) + " requests, " + std::to_string(total) + " answers");
  }
  if (stats.done != answers.done || stats.cancelled != answers.cancelled ||
      stats.expired != answers.expired || stats.failed != answers.failed + answers.non_finite ||
      stats.rejected != rejected) {
    fail("the counters differ from what was answered");
  }
  if (stats.queued != 0 || stats.running != 0) fail("requests are left");
  if (stats.samples < stats.done || stats.effects_max > 8) fail("odd counts of steps");
}

// One queue, many clients; returns the answers of each kind in a line.
std::string run(int64_t requests, int threads, uint64_t seed, bool drain) {
  Answers answers;
  std::atomic<int64_t> rejected{0};
  int64_t submitted = 0;
  clora::Stats stats;
  {
    StepQueue queue(Engine{8}, 8, 64);
    std::vector<Client> clients(threads, Client{rejected});
    std::vector<std::thread> running;
    for (int i = 0; i < threads; ++i) {
      const int64_t share = requests / threads + (i < requests % threads ? 1 : 0);
      running.emplace_back([&, i, share] { clients[i].run(queue, answers, share, seed * 1000 + i); });
    }
    for (std::thread& thread : running) thread.join();
    for (const Client& client : clients) submitted += client.submitted;
    queue.close(drain);
    try {
      queue.submit(std::make_unique<Sum>(answers, 0.0F));
      fail("a closed queue took a request");
    } catch (const clora::Closed&) {
    }
    stats = queue.stats();
  }
  check_counts(stats, answers, submitted, rejected);
  char line[200];
  std::snprintf(line, sizeof line,
                "%lld requests: %lld done, %lld cancelled, %lld expired, %lld failed; batch %.2f",
                static_cast<long long>(submitted), static_cast<long long>(answers.done),
                static_cast<long long>(answers.cancelled), static_cast<long long>(answers.expired),
                static_cast<long long>(answers.failed + answers.non_finite),
                static_cast<double>(stats.samples) / static_cast<double>(std::max<int64_t>(stats.steps, 1)));
  return line;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t requests = argc > 1 ? std::atoll(argv[1]) : 10000;
  const int threads = argc > 2 ? std::atoi(argv[2]) : 8;
  const uint64_t seed = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 0;
  run(requests / 10, threads, seed + 1, true);  // warms the allocator up
  const int64_t before = resident_kilobytes();
  const std::string line = run(requests, threads, seed, true);
  const int64_t grown = resident_kilobytes() - before;
  // Queues that end with requests in flight, many times.
  for (uint64_t i = 0; i < 20; ++i) run(200, threads, seed + 100 + i, false);
  if (alive != 0) fail(std::to_string(alive) + " requests were never freed");
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  if (grown > 4096) fail("memory grew by " + std::to_string(grown) + " kB");
#endif
  std::printf("%s; memory +%lld kB\n", line.c_str(), static_cast<long long>(grown));
  return faults == 0 ? 0 : 1;
}
