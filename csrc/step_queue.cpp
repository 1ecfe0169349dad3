#include "step_queue.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

namespace clora {
namespace {

struct Answer {
  std::unique_ptr<Work> work;
  Outcome outcome;
  std::string message;
};

void give(std::vector<Answer>& answers) {
  for (Answer& answer : answers) {
    answer.work->finish(answer.outcome, answer.message);
    answer.work.reset();
  }
  answers.clear();
}

int64_t& counter(Stats& stats, Outcome outcome) {
  switch (outcome) {
    case Outcome::done:
      return stats.done;
    case Outcome::cancelled:
      return stats.cancelled;
    case Outcome::expired:
      return stats.expired;
    default:
      return stats.failed;
  }
}

}  // namespace

struct StepQueue::State {
  struct Entry {
    std::unique_ptr<Work> work;
    bool started = false;
    bool cancelled = false;
  };

  State(Step step, int max_batch, int max_queue)
      : step(std::move(step)), max_batch(static_cast<size_t>(max_batch)), max_queue(max_queue) {}

  const Step step;
  const size_t max_batch;
  const int64_t max_queue;

  mutable std::mutex mutex;
  std::condition_variable wake;   // of the thread: there is work, or an end
  std::condition_variable ended;  // of who closes
  std::vector<Entry> live;        // by age
  Stats counters;
  uint64_t last_ticket = 0;
  bool closing = false, dropping = false, over = false;

  std::mutex joining;
  std::thread thread;
  std::thread::id thread_id;  // also when it was joined

  int64_t num_started() const {
    return std::count_if(live.begin(), live.end(), [](const Entry& entry) { return entry.started; });
  }

  int64_t num_waiting() const {
    return std::count_if(live.begin(), live.end(),
                         [](const Entry& entry) { return !entry.started && !entry.cancelled; });
  }

  // Takes those out that need no more steps. Needs the mutex.
  void sweep(Clock::time_point now, std::vector<Answer>& answers) {
    for (Entry& entry : live) {
      if (entry.cancelled) {
        answers.push_back({std::move(entry.work), Outcome::cancelled, "cancelled"});
      } else if (dropping) {
        answers.push_back({std::move(entry.work), Outcome::cancelled, "the batcher was closed"});
      } else if (entry.work->deadline && *entry.work->deadline <= now) {
        std::string message = "its time ran out after " + std::to_string(entry.work->step) + " of " +
                              std::to_string(entry.work->num_steps) + " steps";
        answers.push_back({std::move(entry.work), Outcome::expired, std::move(message)});
      }
    }
    remove_taken(answers);
  }

  // Needs the mutex.
  void remove_taken(const std::vector<Answer>& answers) {
    std::erase_if(live, [](const Entry& entry) { return entry.work == nullptr; });
    for (const Answer& answer : answers) ++counter(counters, answer.outcome);
  }

  // The works of the next step. Needs the mutex.
  std::vector<Work*> choose() {
    std::vector<Work*> batch;
    std::set<std::string> effects;
    for (Entry& entry : live) {
      if (batch.size() == max_batch) break;
      if (entry.work->bucket != live.front().work->bucket) continue;
      entry.started = true;
      batch.push_back(entry.work.get());
      effects.insert(entry.work->effect);
    }
    if (!batch.empty()) {
      ++counters.steps;
      counters.samples += static_cast<int64_t>(batch.size());
      counters.effects_last = static_cast<int64_t>(effects.size());
      counters.effects_max = std::max(counters.effects_max, counters.effects_last);
      counters.effects_sum += counters.effects_last;
    }
    return batch;
  }

  // Counts the step, and takes those out that it ended. Needs the mutex.
  void settle(const std::vector<Work*>& batch, std::vector<std::optional<Fault>>& faults,
              std::vector<Answer>& answers) {
    for (size_t i = 0; i < batch.size(); ++i) {
      const auto entry = std::find_if(live.begin(), live.end(),
                                      [&](const Entry& one) { return one.work.get() == batch[i]; });
      if (faults[i]) {
        answers.push_back({std::move(entry->work), faults[i]->outcome, std::move(faults[i]->message)});
      } else if (++batch[i]->step >= batch[i]->num_steps) {
        answers.push_back({std::move(entry->work), Outcome::done, ""});
      }
    }
    remove_taken(answers);
  }

  std::vector<std::optional<Fault>> run(const std::vector<Work*>& batch) {
    std::string message;
    try {
      std::vector<std::optional<Fault>> faults = step(batch);
      if (faults.size() == batch.size()) return faults;
      message = "the step answered for " + std::to_string(faults.size()) + " requests of " +
                std::to_string(batch.size());
    } catch (const std::exception& error) {
      message = error.what();
    } catch (...) {
      message = "the engine failed with something that is no std::exception";
    }
    return std::vector<std::optional<Fault>>(batch.size(), Fault{Outcome::failed, message});
  }

  void work() {
    std::vector<Answer> answers;
    std::vector<Work*> batch;
    while (true) {
      {
        std::unique_lock<std::mutex> lock(mutex);
        wake.wait(lock, [&] { return closing || !live.empty(); });
        if (live.empty()) break;
        sweep(Clock::now(), answers);
        batch = choose();
      }
      give(answers);
      if (batch.empty()) continue;
      const Clock::time_point start = Clock::now();
      std::vector<std::optional<Fault>> faults = run(batch);
      const std::chrono::duration<double> took = Clock::now() - start;
      {
        const std::lock_guard<std::mutex> lock(mutex);
        counters.busy_seconds += took.count();
        settle(batch, faults, answers);
      }
      give(answers);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    over = true;
    ended.notify_all();
  }
};

StepQueue::StepQueue(Step step, int max_batch, int max_queue) {
  if (max_batch < 1 || max_queue < 1) throw std::invalid_argument("max_batch and max_queue must be positive");
  state_ = std::make_shared<State>(std::move(step), max_batch, max_queue);
  state_->thread = std::thread([state = state_] { state->work(); });
  state_->thread_id = state_->thread.get_id();
}

StepQueue::~StepQueue() {
  close(false);
  const std::lock_guard<std::mutex> lock(state_->joining);
  // Left unjoined only where the queue's own thread destroys it: the thread then holds the state and ends by
  // itself.
  if (state_->thread.joinable()) state_->thread.detach();
}

uint64_t StepQueue::submit(std::unique_ptr<Work> work) {
  State& state = *state_;
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (state.closing) throw Closed("the batcher is closed; it takes no more requests");
  // The second bound holds where works of many buckets have begun and wait for their next step.
  const int64_t most = state.max_queue + static_cast<int64_t>(state.max_batch);
  if (state.num_waiting() >= state.max_queue || static_cast<int64_t>(state.live.size()) >= 2 * most) {
    ++state.counters.rejected;
    throw QueueFull("as many requests wait as may (" + std::to_string(state.max_queue) +
                    "); try again later");
  }
  const uint64_t ticket = work->ticket = ++state.last_ticket;
  state.live.push_back({std::move(work)});
  state.wake.notify_one();
  return ticket;
}

bool StepQueue::cancel(uint64_t ticket) {
  State& state = *state_;
  const std::lock_guard<std::mutex> lock(state.mutex);
  for (State::Entry& entry : state.live) {
    if (entry.work->ticket == ticket) return !std::exchange(entry.cancelled, true);
  }
  return false;
}

Stats StepQueue::stats() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  Stats stats = state_->counters;
  stats.running = state_->num_started();
  stats.queued = state_->num_waiting();
  return stats;
}

void StepQueue::close(bool drain, std::optional<std::chrono::duration<double>> timeout) {
  State& state = *state_;
  const bool own_thread = std::this_thread::get_id() == state.thread_id;
  {
    std::unique_lock<std::mutex> lock(state.mutex);
    state.closing = true;
    state.dropping |= !drain;
    state.wake.notify_all();
    if (own_thread) return;
    if (timeout && !state.ended.wait_for(lock, *timeout, [&] { return state.over; })) state.dropping = true;
  }
  const std::lock_guard<std::mutex> lock(state.joining);
  if (state.thread.joinable()) state.thread.join();
}

}  // namespace clora
