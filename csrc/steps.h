// The arithmetic of one sampling step, shared by the loop and the batcher, so that both round alike.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <string>
#include <vector>

namespace clora {

// consistency: predict the data, noise it afresh to the next level. euler: follow the velocity.
enum class Sampler { consistency, euler };

// Throws c10::ValueError for another name.
Sampler sampler_named(const std::string& name);

// The levels (S,), known to fall strictly within (0, 1]; throws c10::ValueError.
std::vector<float> checked_sigmas(const at::Tensor& sigmas);

// fp32 on the CPU: what the plain loops below take, contiguous.
bool is_plain_float(const at::Tensor& x);

// Does any of `count` values have an infinity or a NaN?
bool has_non_finite(const float* values, int64_t count);

// x0 <- x - sigma v
void predict_data(int64_t count, float sigma, const float* v, const float* x, float* x0);
// x <- (1 - sigma) x0 + sigma eps
void noise_afresh(int64_t count, float sigma, const float* x0, const float* eps, float* x);
// x <- x + (sigma_next - sigma) v
void follow(int64_t count, float sigma, float sigma_next, const float* v, float* x);

}  // namespace clora
