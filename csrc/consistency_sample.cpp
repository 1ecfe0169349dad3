#include "consistency_sample.h"

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

std::vector<float> checked_sigmas(const at::Tensor& sigmas) {
  TORCH_CHECK_VALUE(sigmas.dim() == 1 && sigmas.numel() > 0,
                    "sigmas must be a list of at least one noise level, got shape ", sigmas.sizes());
  TORCH_CHECK_VALUE(sigmas.is_floating_point(), "sigmas must be floating point, got ", sigmas.scalar_type());
  const at::Tensor levels = sigmas.to(at::kCPU, at::kFloat).contiguous();
  const float* first = levels.const_data_ptr<float>();
  std::vector<float> result(first, first + levels.numel());
  for (size_t k = 0; k < result.size(); ++k) {
    TORCH_CHECK_VALUE(result[k] > 0.0F && result[k] <= 1.0F, "sigmas[", k, "] = ", result[k],
                      " is outside (0, 1]; 1 is pure noise and the final 0 is left out");
    TORCH_CHECK_VALUE(k == 0 || result[k] < result[k - 1], "sigmas must fall strictly, but sigmas[", k,
                      "] = ", result[k], " follows sigmas[", k - 1, "] = ", result[k - 1]);
  }
  return result;
}

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

bool is_plain_float(const at::Tensor& x) {
  return x.device().is_cpu() && x.scalar_type() == at::kFloat;
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
  for (int64_t b = 0; b < batch; ++b, v += count) {
    // A maximum over the bits without the sign vectorises; infinities and NaNs have the largest exponent.
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, v + i, sizeof bits);
      largest = std::max(largest, bits & 0x7fffffffU);
    }
    if (largest >= 0x7f800000U) return b;
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
void predict_data(const at::Tensor& v_BTC, float sigma, const at::Tensor& x_BTC, at::Tensor& x0_BTC) {
  if (!is_plain_float(x_BTC)) {
    at::mul_out(x0_BTC, v_BTC, at::scalar_tensor(sigma));
    at::sub_out(x0_BTC, x_BTC, x0_BTC);
    return;
  }
  const float *v = v_BTC.const_data_ptr<float>(), *x = x_BTC.const_data_ptr<float>();
  float* x0 = x0_BTC.mutable_data_ptr<float>();
  const int64_t count = x_BTC.numel();
  for (int64_t i = 0; i < count; ++i) x0[i] = x[i] - sigma * v[i];
}

// x <- (1 - sigma) x0 + sigma eps. Overwrites eps where the arithmetic goes through ATen.
void noise_afresh(const at::Tensor& x0_BTC, float sigma, at::Tensor& eps_BTC, at::Tensor& x_BTC) {
  const float keep = 1.0F - sigma;
  if (!is_plain_float(x_BTC)) {
    eps_BTC.mul_(sigma);
    at::mul_out(x_BTC, x0_BTC, at::scalar_tensor(keep));
    x_BTC.add_(eps_BTC);
    return;
  }
  const float *x0 = x0_BTC.const_data_ptr<float>(), *eps = eps_BTC.const_data_ptr<float>();
  float* x = x_BTC.mutable_data_ptr<float>();
  const int64_t count = x_BTC.numel();
  for (int64_t i = 0; i < count; ++i) x[i] = keep * x0[i] + sigma * eps[i];
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

at::Tensor consistency_sample(const Velocity& velocity, const at::Tensor& noise_BTC,
                              std::vector<at::Generator> generators, const at::Tensor& sigmas,
                              const OnStep& on_step) {
  check_noise(noise_BTC, generators);
  const std::vector<float> levels = checked_sigmas(sigmas);
  const c10::NoGradGuard no_grad;

  at::Tensor x = noise_BTC.clone(at::MemoryFormat::Contiguous);
  at::Tensor x0 = at::empty_like(x);
  at::Tensor eps = at::empty_like(x);
  at::Tensor draw = is_plain_float(x) ? eps : at::empty(x.sizes(), at::dtype(at::kFloat));
  const at::Tensor sigma_SB =
      sigmas.to(x.device(), at::kFloat).unsqueeze(1).expand({sigmas.numel(), x.size(0)}).contiguous();

  for (size_t step = 0; step < levels.size(); ++step) {
    const float sigma = levels[step];
    const auto k = static_cast<int64_t>(step);
    const bool last = step + 1 == levels.size();
    const at::Tensor v = checked_velocity(velocity(x, sigma_SB[k]), x, step, sigma);
    if (!last) draw_noise(generators, draw, eps);
    if (!last && x.is_cuda() && x.scalar_type() == at::kFloat) {
      std::tie(x0, x) = renoise(x, v, sigma_SB[k], sigma_SB[k + 1], eps);
    } else {
      predict_data(v, sigma, x, x0);
      if (!last) noise_afresh(x0, levels[step + 1], eps, x);
    }
    if (on_step) on_step(k, sigma, x0.clone());
  }
  return x0;
}

}  // namespace clora
