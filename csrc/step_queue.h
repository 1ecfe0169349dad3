// The queue of the step-level batcher, free of tensors: which requests take the next step together.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace clora {

using Clock = std::chrono::steady_clock;

enum class Outcome { done, cancelled, expired, failed, non_finite };

// One request as the queue sees it; what it works on is the subclass's. A work is destroyed outside every
// lock.
class Work {
 public:
  virtual ~Work() = default;
  // The answer, given exactly once, without a lock held, by the queue's thread.
  virtual void finish(Outcome outcome, const std::string& message) noexcept = 0;

  int64_t bucket = 0;  // works of one bucket may share a step
  std::string effect;
  int num_steps = 1;
  std::optional<Clock::time_point> deadline;

  int step = 0;         // steps done; the queue's thread alone writes it
  uint64_t ticket = 0;  // unique in its queue, rising with age
};

// What is wrong with one work of a step: it fails, the others go on.
struct Fault {
  Outcome outcome;
  std::string message;
};

// Does one step for every work of a batch: 1 to max_batch, of one bucket, oldest first. Returns a fault or
// none for each. What it throws fails the whole batch, and the queue goes on.
using Step = std::function<std::vector<std::optional<Fault>>(const std::vector<Work*>& batch)>;

struct QueueFull : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct Closed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Stats {
  int64_t queued = 0, running = 0;  // now: without a step yet, with one
  int64_t done = 0, cancelled = 0, expired = 0, failed = 0, rejected = 0;
  int64_t steps = 0, samples = 0;                              // batches, and the works in them
  int64_t effects_last = 0, effects_max = 0, effects_sum = 0;  // distinct effects of a batch
  double busy_seconds = 0;                                     // spent in steps
};

// One thread that does steps while there is work. Fair: the step is the oldest request's, and others of its
// bucket ride along, oldest first; so nothing that comes later delays a request, whatever its bucket.
// Cancelled and expired requests are answered at the next step.
class StepQueue {
 public:
  // max_queue bounds the works that wait for their first step. Throws std::invalid_argument unless both are
  // positive.
  StepQueue(Step step, int max_batch, int max_queue);
  ~StepQueue();  // close(false)
  StepQueue(const StepQueue&) = delete;
  StepQueue& operator=(const StepQueue&) = delete;

  // Returns the ticket. Throws QueueFull and Closed; then the work has no answer.
  uint64_t submit(std::unique_ptr<Work> work);
  // True where the request was there and not cancelled before; its answer may still be another, if it came
  // first.
  bool cancel(uint64_t ticket);
  Stats stats() const;
  // Takes no more; with `drain` finishes what is there, for `timeout` at most; cancels the rest. Returns when
  // the thread has ended; called from the queue's own thread, at once.
  void close(bool drain, std::optional<std::chrono::duration<double>> timeout = std::nullopt);

 private:
  struct State;  // shared with the thread, which may outlive the queue where it is itself the one that
                 // destroys it
  std::shared_ptr<State> state_;
};

}  // namespace clora
