// What denoises: a network at the noise levels of one schedule, whatever runs it.
// B batch, T tokens of the result, R of the references, M of the padded text, C latent channels, D text
// width, J = T + R + M, E width of a head.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <optional>
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

// The sizes of inputs, or what a package takes: widths and type exactly these, numbers up to these.
struct Shapes {
  int64_t batch = 0, tokens = 0, refs = 0, text = 0;  // B, T, R, M
  int64_t channels = 0, text_width = 0, angles = 0;   // C, D, E / 2
  at::ScalarType dtype = at::kFloat;
};

// Why inputs of the sizes `given` are not for a package that takes `taken`, as in "'text' is of width 1, the
// package takes 32"; "" where they are.
std::string misfit(const Shapes& given, const Shapes& taken);

// What a package says it takes, without loading it; none for one that was made before packages said so. The
// compiled code checks nothing: inputs of other widths would be read beyond their ends. Throws c10::Error for
// a file that is no package.
std::optional<Shapes> package_shapes(const std::string& package);

// An AOTInductor package, opened: native code that this runs, so that the file must have been checked before.
// Calls from several threads take turns; inputs that are not for the package are c10::ValueError. Throws
// c10::Error for a file that is no package.
std::unique_ptr<Engine> open_aoti(const std::string& package);

}  // namespace clora
