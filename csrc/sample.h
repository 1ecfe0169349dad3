// The sampling loop, free of Python: shape legend B batch, T tokens, C latent channels, S steps.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <vector>

#include "engine.h"
#include "steps.h"

namespace clora {

// velocity(x_BTC, sigma_B, step) -> v_BTC. x_BTC is the loop's own buffer: read it, copy it, never keep it.
using Velocity = std::function<at::Tensor(const at::Tensor& x_BTC, const at::Tensor& sigma_B, int64_t step)>;

// Called after each step with the predicted data (a copy). Throwing from it ends the loop.
using OnStep = std::function<void(int64_t step, double sigma, const at::Tensor& x0_BTC)>;

// The velocity held an infinity or a NaN; the message names the step and the sample.
struct NonFiniteVelocity : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Sampling from pure noise at sigmas[0]; sigmas (S,) falls strictly within (0, 1]. Step k predicts the data,
//   x0 = x - sigma_k v(x, sigma_k)                     (the last step returns x0)
// and goes to the next level:
//   consistency:  x = (1 - sigma_{k+1}) x0 + sigma_{k+1} eps
//   euler:        x = x + (sigma_{k+1} - sigma_k) v
// Sample b draws its eps from generators[b] (on the CPU, fp32, T*C values a step, none at the last and none
// for euler), so a sample's noise does not depend on its batch or on the device. Arithmetic runs in the dtype
// (fp32 or fp64) and on the device of noise_BTC; the velocity is cast to that. Throws c10::ValueError
// (shapes, sigmas, devices) and NonFiniteVelocity.
at::Tensor sample(const Velocity& velocity, const at::Tensor& noise_BTC,
                  std::vector<at::Generator> generators, const at::Tensor& sigmas, Sampler sampler,
                  const OnStep& on_step);

// The velocity of an engine under `conditions` (x and step are filled in), whose x is of type `dtype`.
// `engine` must outlive it.
Velocity engine_velocity(Engine& engine, Inputs conditions, at::ScalarType dtype);

}  // namespace clora
