// Step-level continuous batching over an engine: requests at different steps, effects and seeds share
// forwards. T tokens of the result, R of the references, M of the padded text, C latent channels, D text
// width, J = T + R + M, E width of a head.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine.h"
#include "step_queue.h"
#include "steps.h"

namespace clora {

struct Request {
  int64_t bucket = 0;       // requests of one bucket have the same T, R, M, cos and sin
  at::Tensor noise;         // (T, C), fp32 on the CPU: the first draw
  at::Tensor refs;          // (R, C)
  at::Tensor text;          // (M, D)
  at::Tensor cos, sin;      // (J, E / 2), fp32
  int64_t text_len = 0;     // tokens of text that count
  at::Generator generator;  // past its first draw; read at every step but the last
  std::string effect;
  std::optional<double> timeout;  // seconds
  // (steps done, steps in all) after each step; what it throws fails the request.
  std::function<void(int, int)> on_step;
  // The answer, once: x0 (T, C) fp32 where the outcome is done, otherwise a message. It must not throw.
  std::function<void(Outcome, const at::Tensor& x0_TC, const std::string& message)> on_done;
};

// A request's arithmetic is its own (its noise level, noise and generator); of a batch it shares the forward
// alone. With an engine whose rows do not depend on their neighbours its result is, bit for bit, that of
// `sample`.
class Batcher {
 public:
  // Throws c10::ValueError for sigmas as `checked_sigmas` does. dtype: of the engine's x, refs and text.
  Batcher(std::shared_ptr<Engine> engine, const at::Tensor& sigmas, Sampler sampler, at::ScalarType dtype,
          int max_batch, int max_queue);

  // Throws c10::ValueError for shapes that do not fit together, QueueFull and Closed.
  uint64_t submit(Request request);
  bool cancel(uint64_t ticket) { return queue_.cancel(ticket); }
  Stats stats() const { return queue_.stats(); }
  int max_batch() const { return max_batch_; }
  void close(bool drain, std::optional<double> timeout);

 private:
  const at::ScalarType dtype_;
  const int num_steps_, max_batch_;
  StepQueue queue_;
};

}  // namespace clora
