#include "steps.h"

#include <algorithm>
#include <cstring>

namespace clora {

Sampler sampler_named(const std::string& name) {
  if (name == "consistency") return Sampler::consistency;
  if (name == "euler") return Sampler::euler;
  TORCH_CHECK_VALUE(false, "sampler is '", name, "'; choose consistency or euler");
}

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

bool is_plain_float(const at::Tensor& x) {
  return x.device().is_cpu() && x.scalar_type() == at::kFloat;
}

bool has_non_finite(const float* values, int64_t count) {
  // A maximum over the bits without the sign vectorises; infinities and NaNs have the largest exponent.
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    largest = std::max(largest, bits & 0x7fffffffU);
  }
  return largest >= 0x7f800000U;
}

void predict_data(int64_t count, float sigma, const float* v, const float* x, float* x0) {
  for (int64_t i = 0; i < count; ++i) x0[i] = x[i] - sigma * v[i];
}

void noise_afresh(int64_t count, float sigma, const float* x0, const float* eps, float* x) {
  const float keep = 1.0F - sigma;
  for (int64_t i = 0; i < count; ++i) x[i] = keep * x0[i] + sigma * eps[i];
}

void follow(int64_t count, float sigma, float sigma_next, const float* v, float* x) {
  const float by = sigma_next - sigma;
  for (int64_t i = 0; i < count; ++i) x[i] = x[i] + by * v[i];
}

}  // namespace clora
