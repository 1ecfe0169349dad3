// What denoises: a network at the noise levels of one schedule, whatever runs it.
// B batch, T tokens of the result, R of the references, M of the padded text, C latent channels, D text
// width, J = T + R + M, E width of a head.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <string>

namespace clora {

struct Inputs {
  at::Tensor x;         // (B, T, C), the network's dtype, as refs and text
  at::Tensor refs;      // (B, R, C)
  at::Tensor text;      // (B, M, D)
  at::Tensor cos, sin;  // (J, E / 2), fp32
  at::Tensor step;      // (B,), int64: each sample's place in the schedule
  at::Tensor text_len;  // (B,), int64
};

// The inputs are the caller's buffers: an engine reads them during the call and keeps none.
class Engine {
 public:
  virtual ~Engine() = default;
  // The velocity (B, T, C), any floating type.
  virtual at::Tensor denoise(const Inputs& inputs) = 0;
};

// An AOTInductor package, opened: native code that this runs, so that the file must have been checked before.
// Calls from several threads take turns. Throws c10::Error for a file that is no package.
std::unique_ptr<Engine> open_aoti(const std::string& package);

}  // namespace clora
