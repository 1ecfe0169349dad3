#include "sample.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>

namespace clora {
namespace {

void check_noise(const at::Tensor& noise_BTC, const std::vector<at::Generator>& generators) {
  TORCH_CHECK_VALUE(noise_BTC.dim() == 3 && noise_BTC.numel() > 0,
                    "noise must be (batch, tokens, channels) and not empty, got ", noise_BTC.sizes());
  TORCH_CHECK_VALUE(noise_BTC.scalar_type() == at::kFloat || noise_BTC.scalar_type() == at::kDouble,
                    "noise must be float32 or float64, got ", noise_BTC.scalar_type());
  TORCH_CHECK_VALUE(static_cast<int64_t>(generators.size()) == noise_BTC.size(0),
                    "one generator per sample is needed: ", noise_BTC.size(0), " samples, ",
                    generators.size(), " generators");
  for (const at::Generator& generator : generators) {
    TORCH_CHECK_VALUE(
        generator.device().is_cpu(),
        "generators must be on the CPU, so that a seed gives the same noise on every device; got ",
        generator.device());
  }
}

// Index of the first sample that holds an infinity or a NaN, or -1.
int64_t first_non_finite(const at::Tensor& v_BTC) {
  if (!is_plain_float(v_BTC)) {
    const at::Tensor finite_B = at::isfinite(v_BTC).flatten(1).all(1).to(at::kCPU);
    const bool* finite = finite_B.const_data_ptr<bool>();
    const bool* found = std::find(finite, finite + finite_B.numel(), false);
    return found == finite + finite_B.numel() ? -1 : found - finite;
  }
  const int64_t batch = v_BTC.size(0), count = v_BTC.numel() / batch;
  const float* v = v_BTC.const_data_ptr<float>();
  for (int64_t b = 0; b < batch; ++b) {
    if (has_non_finite(v + b * count, count)) return b;
  }
  return -1;
}

at::Tensor checked_velocity(const at::Tensor& v_BTC, const at::Tensor& x_BTC, size_t step, float sigma) {
  TORCH_CHECK_VALUE(v_BTC.sizes() == x_BTC.sizes(), "velocity returned shape ", v_BTC.sizes(),
                    " for x of shape ", x_BTC.sizes(), " at step ", step, "; the two must be equal");
  TORCH_CHECK_VALUE(v_BTC.device() == x_BTC.device(), "velocity returned a tensor on ", v_BTC.device(),
                    " for x on ", x_BTC.device(), " at step ", step);
  at::Tensor v = v_BTC.to(x_BTC.scalar_type()).contiguous();
  const int64_t sample = first_non_finite(v);
  if (sample >= 0) {
    throw NonFiniteVelocity("velocity is not finite at step " + std::to_string(step) + " (sigma " +
                            std::to_string(sigma) + "), sample " + std::to_string(sample));
  }
  return v;
}

// eps_BTC[b] ~ N(0, 1) from generators[b]; drawn in fp32 on the CPU, in `draw_BTC` where eps lives elsewhere.
void draw_noise(std::vector<at::Generator>& generators, at::Tensor& draw_BTC, at::Tensor& eps_BTC) {
  for (size_t b = 0; b < generators.size(); ++b) {
    draw_BTC.select(0, static_cast<int64_t>(b)).normal_(0.0, 1.0, generators[b]);
  }
  if (!draw_BTC.is_same(eps_BTC)) eps_BTC.copy_(draw_BTC);
}

// x0 <- x - sigma v. One thread: a step moves a few megabytes, far less time than drawing its noise takes.
void predict_tensor(const at::Tensor& v_BTC, float sigma, const at::Tensor& x_BTC, at::Tensor& x0_BTC) {
  if (!is_plain_float(x_BTC)) {
    at::mul_out(x0_BTC, v_BTC, at::scalar_tensor(sigma));
    at::sub_out(x0_BTC, x_BTC, x0_BTC);
    return;
  }
  predict_data(x_BTC.numel(), sigma, v_BTC.const_data_ptr<float>(), x_BTC.const_data_ptr<float>(),
               x0_BTC.mutable_data_ptr<float>());
}

// x <- (1 - sigma) x0 + sigma eps. Overwrites eps where the arithmetic goes through ATen.
void noise_tensor(const at::Tensor& x0_BTC, float sigma, at::Tensor& eps_BTC, at::Tensor& x_BTC) {
  if (!is_plain_float(x_BTC)) {
    eps_BTC.mul_(sigma);
    at::mul_out(x_BTC, x0_BTC, at::scalar_tensor(1.0F - sigma));
    x_BTC.add_(eps_BTC);
    return;
  }
  noise_afresh(x_BTC.numel(), sigma, x0_BTC.const_data_ptr<float>(), eps_BTC.const_data_ptr<float>(),
               x_BTC.mutable_data_ptr<float>());
}

// x <- x + (sigma_next - sigma) v
void follow_tensor(const at::Tensor& v_BTC, float sigma, float sigma_next, at::Tensor& x_BTC) {
  if (!is_plain_float(x_BTC)) {
    x_BTC.add_(v_BTC * at::scalar_tensor(sigma_next - sigma));
    return;
  }
  follow(x_BTC.numel(), sigma, sigma_next, v_BTC.const_data_ptr<float>(), x_BTC.mutable_data_ptr<float>());
}

// (x0, next x) of fp32 latents on a GPU in one pass, by the Triton op that clora/kernels/renoise.py
// registers.
std::tuple<at::Tensor, at::Tensor> renoise(const at::Tensor& x_BTC, const at::Tensor& v_BTC,
                                           const at::Tensor& sigma_B, const at::Tensor& sigma_next_B,
                                           const at::Tensor& eps_BTC) {
  using Op = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                const at::Tensor&, const std::optional<at::Tensor>&,
                                                const std::optional<at::Tensor>&, c10::SymInt);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("clora::renoise", "").typed<Op>();
  return op.call(x_BTC, v_BTC, sigma_B, sigma_next_B, eps_BTC, std::nullopt, 0);
}

}  // namespace

at::Tensor sample(const Velocity& velocity, const at::Tensor& noise_BTC,
                  std::vector<at::Generator> generators, const at::Tensor& sigmas, Sampler sampler,
                  const OnStep& on_step) {
  check_noise(noise_BTC, generators);
  const std::vector<float> levels = checked_sigmas(sigmas);
  const c10::NoGradGuard no_grad;

  at::Tensor x = noise_BTC.clone(at::MemoryFormat::Contiguous);
  at::Tensor x0 = at::empty_like(x);
  at::Tensor eps = sampler == Sampler::consistency ? at::empty_like(x) : at::Tensor();
  at::Tensor draw = is_plain_float(x) ? eps : at::empty(x.sizes(), at::dtype(at::kFloat));
  const at::Tensor sigma_SB =
      sigmas.to(x.device(), at::kFloat).unsqueeze(1).expand({sigmas.numel(), x.size(0)}).contiguous();

  for (size_t step = 0; step < levels.size(); ++step) {
    const float sigma = levels[step];
    const auto k = static_cast<int64_t>(step);
    const bool last = step + 1 == levels.size();
    const bool fresh = !last && sampler == Sampler::consistency;
    const at::Tensor v = checked_velocity(velocity(x, sigma_SB[k], k), x, step, sigma);
    if (fresh) draw_noise(generators, draw, eps);
    if (fresh && x.is_cuda() && x.scalar_type() == at::kFloat) {
      std::tie(x0, x) = renoise(x, v, sigma_SB[k], sigma_SB[k + 1], eps);
    } else {
      if (last || fresh || on_step) predict_tensor(v, sigma, x, x0);
      if (fresh) noise_tensor(x0, levels[step + 1], eps, x);
      if (!fresh && !last) follow_tensor(v, sigma, levels[step + 1], x);
    }
    if (on_step) on_step(k, sigma, x0.clone());
  }
  return x0;
}

Velocity engine_velocity(Engine& engine, Inputs conditions, at::ScalarType dtype) {
  return [&engine, in = std::move(conditions), dtype](const at::Tensor& x_BTC, const at::Tensor&,
                                                      int64_t step) mutable {
    // One buffer for all steps; x itself where its type is right.
    if (dtype == x_BTC.scalar_type()) {
      in.x = x_BTC;
    } else if (in.x.defined()) {
      in.x.copy_(x_BTC);
    } else {
      in.x = x_BTC.to(dtype);
    }
    if (!in.step.defined()) in.step = at::empty({x_BTC.size(0)}, at::kLong);
    in.step.fill_(step);
    return engine.denoise(in);
  };
}

}  // namespace clora
