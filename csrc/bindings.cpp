// The Python module clora._C: the sampling loop and engines; the batcher is in bindings_batcher.cpp.
#include "bindings.h"

#include "sample.h"

namespace clora {

std::shared_ptr<py::object> shared_object(py::object object) {
  return {new py::object(std::move(object)), [](py::object* held) {
            const py::gil_scoped_acquire gil;
            delete held;
          }};
}

at::Tensor as_tensor(const py::object& result, const char* what) {
  if (!THPVariable_Check(result.ptr())) {
    throw py::type_error(std::string(what) + " must return a torch.Tensor, got " +
                         std::string(py::str(py::type::of(result).attr("__name__"))));
  }
  return result.cast<at::Tensor>();
}

namespace {

class PythonEngine : public Engine {
 public:
  explicit PythonEngine(py::object callable) : callable_(shared_object(std::move(callable))) {}

  at::Tensor denoise(const Inputs& in) override {
    const py::gil_scoped_acquire gil;
    const py::object result = (*callable_)(in.x, in.refs, in.text, in.cos, in.sin, in.step, in.text_len);
    return as_tensor(result, "an engine");
  }

 private:
  std::shared_ptr<py::object> callable_;
};

// Wraps a Python callable; the loop runs without the GIL and takes it for each call only.
Velocity as_velocity(const py::object& callable) {
  return [&callable](const at::Tensor& x_BTC, const at::Tensor& sigma_B, int64_t) {
    const py::gil_scoped_acquire gil;
    const py::object result = callable(x_BTC, sigma_B);
    return as_tensor(result, "velocity");
  };
}

OnStep as_on_step(const py::object& callable) {
  if (callable.is_none()) return nullptr;
  return [&callable](int64_t step, double sigma, const at::Tensor& x0_BTC) {
    const py::gil_scoped_acquire gil;
    callable(step, sigma, x0_BTC);
  };
}

at::Tensor run_loop(const Velocity& velocity, const at::Tensor& noise_BTC,
                    const std::vector<at::Generator>& generators, const at::Tensor& sigmas,
                    const std::string& sampler, const py::object& on_step) {
  try {
    const OnStep report = as_on_step(on_step);
    const py::gil_scoped_release no_gil;
    return sample(velocity, noise_BTC, generators, sigmas, sampler_named(sampler), report);
  } catch (const NonFiniteVelocity& error) {
    PyErr_SetString(PyExc_FloatingPointError, error.what());
    throw py::error_already_set();
  }
}

at::Tensor sample_velocity(const py::object& velocity, const at::Tensor& noise_BTC,
                           const std::vector<at::Generator>& generators, const at::Tensor& sigmas,
                           const py::object& on_step, const std::string& sampler) {
  return run_loop(as_velocity(velocity), noise_BTC, generators, sigmas, sampler, on_step);
}

at::Tensor sample_engine(const py::object& engine, const at::Tensor& noise_BTC, const at::Tensor& refs,
                         const at::Tensor& text, const at::Tensor& cos, const at::Tensor& sin,
                         const at::Tensor& text_len, const std::vector<at::Generator>& generators,
                         const at::Tensor& sigmas, const std::string& sampler, at::ScalarType dtype,
                         const py::object& on_step) {
  const std::shared_ptr<Engine> opened = as_engine(engine);
  const Velocity velocity = engine_velocity(
      *opened, {at::Tensor(), refs.to(dtype), text.to(dtype), cos, sin, at::Tensor(), text_len}, dtype);
  return run_loop(velocity, noise_BTC, generators, sigmas, sampler, on_step);
}

}  // namespace

std::shared_ptr<Engine> as_engine(const py::object& engine) {
  if (py::isinstance<Engine>(engine)) return engine.cast<std::shared_ptr<Engine>>();
  if (!PyCallable_Check(engine.ptr())) throw py::type_error("an engine must be an AotiEngine or a callable");
  return std::make_shared<PythonEngine>(engine);
}

}  // namespace clora

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of clora.";
  m.def("sample", torch::wrap_pybind_function(clora::sample_velocity), py::arg("velocity"),
        py::arg("noise_BTC"), py::arg("generators"), py::arg("sigmas"), py::arg("on_step") = py::none(),
        py::arg("sampler") = "consistency",
        R"(Sampling from pure noise at sigmas[0]; returns x0 (B, T, C).

Step k predicts x0 = x - sigma_k velocity(x, sigma_k), which the last step returns, and goes on to
consistency: x = (1 - sigma_{k+1}) x0 + sigma_{k+1} eps;  euler: x = x + (sigma_{k+1} - sigma_k) velocity.

velocity:   (x_BTC, sigma_B fp32) -> (B, T, C). x_BTC is a buffer that the loop writes again: clone to keep it.
noise_BTC:  the first draw, fp32 or fp64; its dtype and device are those of the arithmetic and the result.
generators: one CPU torch.Generator per sample, each past its first draw; consistency reads them at every step
            but the last.
sigmas:     (S,) floating point, strictly falling within (0, 1], without the final 0.
on_step:    None, or (step, sigma, x0_BTC) after each step; what it raises ends the loop.
Raises ValueError for wrong shapes, sigmas or devices, TypeError for a velocity that is no tensor, and
FloatingPointError naming step and sample for a velocity that is not finite.)");
  py::class_<clora::Engine, std::shared_ptr<clora::Engine>>(
      m, "AotiEngine", "An AOTInductor package, opened: native code that is run. Calls take turns.")
      .def(py::init(torch::wrap_pybind_function([](const std::string& package) {
             const py::gil_scoped_release no_gil;
             return std::shared_ptr<clora::Engine>(clora::open_aoti(package));
           })),
           py::arg("package"))
      .def(
          "__call__",
          torch::wrap_pybind_function([](clora::Engine& engine, const at::Tensor& x, const at::Tensor& refs,
                                         const at::Tensor& text, const at::Tensor& cos, const at::Tensor& sin,
                                         const at::Tensor& step, const at::Tensor& text_len) {
            const py::gil_scoped_release no_gil;
            return engine.denoise({x, refs, text, cos, sin, step, text_len});
          }),
          py::arg("x"), py::arg("refs"), py::arg("text"), py::arg("cos"), py::arg("sin"), py::arg("step"),
          py::arg("text_len"));
  m.def(
      "sample_engine", torch::wrap_pybind_function(clora::sample_engine), py::arg("engine"),
      py::arg("noise_BTC"), py::arg("refs_BRC"), py::arg("text_BMD"), py::arg("cos"), py::arg("sin"),
      py::arg("text_len"), py::arg("generators"), py::arg("sigmas"), py::arg("sampler") = "consistency",
      py::arg("dtype") = at::kFloat, py::arg("on_step") = py::none(),
      R"(`sample` by an engine (an AotiEngine, or a callable with its arguments), whose step is the place in sigmas.

refs (B, R, C), text (B, M, D) and x are given to it in `dtype`; cos, sin (T + R + M, E / 2), fp32; text_len
(B,), int64. With an AotiEngine no Python runs in the loop, but on_step.)");
  clora::bind_batcher(m);
}
