// The Python module clora._C.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "consistency_sample.h"

namespace {

// Wraps a Python callable; the loop runs without the GIL and takes it for each call only.
clora::Velocity as_velocity(const py::object& callable) {
  return [&callable](const at::Tensor& x_BTC, const at::Tensor& sigma_B) {
    const py::gil_scoped_acquire gil;
    const py::object result = callable(x_BTC, sigma_B);
    if (!THPVariable_Check(result.ptr())) {
      throw py::type_error("velocity must return a torch.Tensor, got " +
                           std::string(py::str(py::type::of(result).attr("__name__"))));
    }
    return result.cast<at::Tensor>();
  };
}

clora::OnStep as_on_step(const py::object& callable) {
  if (callable.is_none()) return nullptr;
  return [&callable](int64_t step, double sigma, const at::Tensor& x0_BTC) {
    const py::gil_scoped_acquire gil;
    callable(step, sigma, x0_BTC);
  };
}

at::Tensor consistency_sample(const py::object& velocity, const at::Tensor& noise_BTC,
                              const std::vector<at::Generator>& generators, const at::Tensor& sigmas,
                              const py::object& on_step) {
  try {
    const clora::Velocity call = as_velocity(velocity);
    const clora::OnStep report = as_on_step(on_step);
    const py::gil_scoped_release no_gil;
    return clora::consistency_sample(call, noise_BTC, generators, sigmas, report);
  } catch (const clora::NonFiniteVelocity& error) {
    PyErr_SetString(PyExc_FloatingPointError, error.what());
    throw py::error_already_set();
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of clora.";
  m.def("consistency_sample", torch::wrap_pybind_function(consistency_sample), py::arg("velocity"),
        py::arg("noise_BTC"), py::arg("generators"), py::arg("sigmas"), py::arg("on_step") = py::none(),
        R"(Few-step consistency sampling from pure noise at sigmas[0]; returns x0 (B, T, C).

Step k: x0 = x - sigma_k velocity(x, sigma_k), then x = (1 - sigma_{k+1}) x0 + sigma_{k+1} eps.

velocity:   (x_BTC, sigma_B fp32) -> (B, T, C). x_BTC is a buffer that the loop writes again: clone to keep it.
noise_BTC:  the first draw, fp32 or fp64; its dtype and device are those of the arithmetic and the result.
generators: one CPU torch.Generator per sample, each past its first draw; read again at every step but the last.
sigmas:     (S,) floating point, strictly falling within (0, 1], without the final 0.
on_step:    None, or (step, sigma, x0_BTC) after each step; what it raises ends the loop.
Raises ValueError for wrong shapes, sigmas or devices, TypeError for a velocity that is no tensor, and
FloatingPointError naming step and sample for a velocity that is not finite.)");
}
