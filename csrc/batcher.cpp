#include "batcher.h"

#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <utility>

namespace clora {
namespace {

constexpr double MOST_SECONDS = 1e9;  // what a clock's nanoseconds hold

std::chrono::duration<double> seconds(double given) {
  return std::chrono::duration<double>(std::clamp(given, 0.0, MOST_SECONDS));
}

struct Job : Work {
  Request request;
  at::Tensor x;  // (T, C), fp32, its own

  void finish(Outcome outcome, const std::string& message) noexcept override {
    request.on_done(outcome, x, message);
  }
};

// Owned by the queue's thread: the network's inputs, reused from step to step.
class Stepper {
 public:
  Stepper(std::shared_ptr<Engine> engine, std::vector<float> sigmas, Sampler sampler, at::ScalarType dtype,
          int max_batch)
      : engine_(std::move(engine)),
        sigmas_(std::move(sigmas)),
        sampler_(sampler),
        dtype_(dtype),
        max_batch_(max_batch) {}

  std::vector<std::optional<Fault>> operator()(const std::vector<Work*>& works) {
    // A thread has OpenMP's own number of threads until it is told torch's.
    if (!std::exchange(has_threads_, true)) at::init_num_threads();
    const c10::NoGradGuard no_grad;
    const auto batch = static_cast<int64_t>(works.size());
    const at::Tensor v = velocity(works);
    std::vector<std::optional<Fault>> faults(works.size());
    for (int64_t b = 0; b < batch; ++b) {
      auto& job = static_cast<Job&>(*works[b]);
      faults[b] = advance(job, v.const_data_ptr<float>() + b * job.x.numel());
    }
    return faults;
  }

 private:
  // The inputs of a batch. What lies in its row from the step before is not copied again.
  Inputs gather(const std::vector<Work*>& works) {
    const Request& first = static_cast<const Job&>(*works[0]).request;
    if (!in_.x.defined() || first.bucket != bucket_) {
      allocate(first);
      bucket_ = first.bucket;
    }
    const auto batch = static_cast<int64_t>(works.size());
    auto* step = in_.step.mutable_data_ptr<int64_t>();
    auto* text_len = in_.text_len.mutable_data_ptr<int64_t>();
    for (int64_t b = 0; b < batch; ++b) {
      const auto& job = static_cast<const Job&>(*works[b]);
      step[b] = job.step;
      text_len[b] = job.request.text_len;
      in_.x[b].copy_(job.x);
      if (rows_[b] != job.ticket) {
        in_.refs[b].copy_(job.request.refs);
        in_.text[b].copy_(job.request.text);
        rows_[b] = job.ticket;
      }
    }
    const auto rows = [batch](const at::Tensor& whole) { return whole.narrow(0, 0, batch); };
    return {rows(in_.x), rows(in_.refs), rows(in_.text),    in_.cos,
            in_.sin,     rows(in_.step), rows(in_.text_len)};
  }

  void allocate(const Request& like) {
    const auto rows = [&](const at::Tensor& one) {
      return at::empty({max_batch_, one.size(0), one.size(1)}, at::dtype(dtype_));
    };
    in_.x = rows(like.noise);
    in_.refs = rows(like.refs);
    in_.text = rows(like.text);
    in_.cos = like.cos;
    in_.sin = like.sin;
    in_.step = at::empty({max_batch_}, at::kLong);
    in_.text_len = at::empty({max_batch_}, at::kLong);
    x0_ = at::empty_like(like.noise);
    eps_ = at::empty_like(like.noise);
    rows_.assign(max_batch_, 0);
  }

  at::Tensor velocity(const std::vector<Work*>& works) {
    try {
      const Inputs in = gather(works);
      const at::Tensor v = engine_->denoise(in);
      TORCH_CHECK(v.sizes() == in.x.sizes(), "the engine returned shape ", v.sizes(), " for x of shape ",
                  in.x.sizes(), "; the two must be equal");
      return v.to(at::kCPU, at::kFloat).contiguous();
    } catch (const c10::Error& error) {
      throw std::runtime_error(error.what_without_backtrace());
    }
  }

  // One step of one request, with its row of the velocity.
  std::optional<Fault> advance(Job& job, const float* v) {
    const auto k = static_cast<size_t>(job.step);
    const int64_t count = job.x.numel();
    if (has_non_finite(v, count)) {
      return Fault{Outcome::non_finite, "velocity is not finite at step " + std::to_string(k) + " (sigma " +
                                            std::to_string(sigmas_[k]) + ")"};
    }
    float* x = job.x.mutable_data_ptr<float>();
    const bool last = k + 1 == sigmas_.size();
    if (last) {
      predict_data(count, sigmas_[k], v, x, x);
    } else if (sampler_ == Sampler::euler) {
      follow(count, sigmas_[k], sigmas_[k + 1], v, x);
    } else {
      predict_data(count, sigmas_[k], v, x, x0_.mutable_data_ptr<float>());
      eps_.normal_(0.0, 1.0, job.request.generator);
      noise_afresh(count, sigmas_[k + 1], x0_.const_data_ptr<float>(), eps_.const_data_ptr<float>(), x);
    }
    if (!job.request.on_step) return std::nullopt;
    try {
      job.request.on_step(job.step + 1, job.num_steps);
    } catch (const std::exception& error) {
      return Fault{Outcome::failed, error.what()};
    }
    return std::nullopt;
  }

  std::shared_ptr<Engine> engine_;
  std::vector<float> sigmas_;
  Sampler sampler_;
  at::ScalarType dtype_;
  int64_t max_batch_;
  bool has_threads_ = false;
  int64_t bucket_ = 0;
  Inputs in_;                   // of max_batch rows
  std::vector<uint64_t> rows_;  // whose refs and text lie in each row
  at::Tensor x0_, eps_;         // (T, C), of one request at a time
};

void check(const Request& r) {
  for (const at::Tensor& given : {r.noise, r.refs, r.text, r.cos, r.sin}) {
    TORCH_CHECK_VALUE(given.dim() == 2 && given.numel() > 0 && given.device().is_cpu(),
                      "noise, refs, text, cos and sin must be matrices on the CPU, got ", given.sizes(),
                      " on ", given.device());
  }
  TORCH_CHECK_VALUE(r.noise.scalar_type() == at::kFloat, "noise must be float32, got ",
                    r.noise.scalar_type());
  TORCH_CHECK_VALUE(r.refs.size(1) == r.noise.size(1), "refs have ", r.refs.size(1), " channels, noise has ",
                    r.noise.size(1));
  const int64_t joint = r.noise.size(0) + r.refs.size(0) + r.text.size(0);
  TORCH_CHECK_VALUE(r.cos.sizes() == r.sin.sizes() && r.cos.size(0) == joint, "cos ", r.cos.sizes(),
                    " and sin ", r.sin.sizes(), " are not the positions of ", joint, " tokens");
  TORCH_CHECK_VALUE(r.text_len >= 1 && r.text_len <= r.text.size(0), "text_len is ", r.text_len, " of ",
                    r.text.size(0), " tokens");
  TORCH_CHECK_VALUE(r.generator.defined() && r.generator.device().is_cpu(),
                    "the generator must be on the CPU");
}

int positive(int number) {
  TORCH_CHECK_VALUE(number > 0, "max_batch and max_queue must be positive");
  return number;
}

}  // namespace

Batcher::Batcher(std::shared_ptr<Engine> engine, const at::Tensor& sigmas, Sampler sampler,
                 at::ScalarType dtype, int max_batch, int max_queue)
    : dtype_(dtype),
      num_steps_(static_cast<int>(sigmas.numel())),
      max_batch_(positive(max_batch)),
      queue_(Stepper(std::move(engine), checked_sigmas(sigmas), sampler, dtype, max_batch), max_batch,
             positive(max_queue)) {}

uint64_t Batcher::submit(Request request) {
  check(request);
  auto job = std::make_unique<Job>();
  job->bucket = request.bucket;
  job->effect = request.effect;
  job->num_steps = num_steps_;
  if (request.timeout) {
    job->deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(seconds(*request.timeout));
  }
  job->x = request.noise.clone(at::MemoryFormat::Contiguous);
  job->request = std::move(request);
  return queue_.submit(std::move(job));
}

void Batcher::close(bool drain, std::optional<double> timeout) {
  queue_.close(drain, timeout ? std::optional(seconds(*timeout)) : std::nullopt);
}

}  // namespace clora
