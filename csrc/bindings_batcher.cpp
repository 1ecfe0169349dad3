// The batcher in Python: answers and progress are called on its thread, with the GIL.
#include <map>

#include "batcher.h"
#include "bindings.h"

namespace clora {
namespace {

// A Python error in one line; the traceback is dropped with it.
std::string one_line(const py::error_already_set& error) {
  const std::string kind = py::str(error.type().attr("__name__")), text = py::str(error.value());
  return text.empty() ? kind : kind + ": " + text;
}

// Gives errors of Python to a thread that holds no GIL.
class PlainErrors : public Engine {
 public:
  explicit PlainErrors(std::shared_ptr<Engine> engine) : engine_(std::move(engine)) {}

  at::Tensor denoise(const Inputs& inputs) override {
    try {
      return engine_->denoise(inputs);
    } catch (py::error_already_set& error) {
      const py::gil_scoped_acquire gil;
      throw std::runtime_error(one_line(error));
    }
  }

 private:
  std::shared_ptr<Engine> engine_;
};

const char* name_of(Outcome outcome) {
  switch (outcome) {
    case Outcome::done:
      return "done";
    case Outcome::cancelled:
      return "cancelled";
    case Outcome::expired:
      return "expired";
    case Outcome::non_finite:
      return "non_finite";
    default:
      return "failed";
  }
}

std::function<void(int, int)> as_progress(const py::object& callable) {
  if (callable.is_none()) return nullptr;
  return [held = shared_object(callable)](int step, int num_steps) {
    const py::gil_scoped_acquire gil;
    try {
      (*held)(step, num_steps);
    } catch (py::error_already_set& error) {
      throw std::runtime_error("on_step raised " + one_line(error));
    }
  };
}

std::function<void(Outcome, const at::Tensor&, const std::string&)> as_answer(const py::object& callable) {
  return [held = shared_object(callable)](Outcome outcome, const at::Tensor& x0, const std::string& message) {
    const py::gil_scoped_acquire gil;
    try {
      const py::object result = outcome == Outcome::done ? py::cast(x0) : py::none();
      (*held)(name_of(outcome), result, message);
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("an answer of clora._C.Batcher");
    }
  };
}

uint64_t submit(Batcher& batcher, int64_t bucket, const at::Tensor& noise, const at::Tensor& refs,
                const at::Tensor& text, const at::Tensor& cos, const at::Tensor& sin, int64_t text_len,
                const at::Generator& generator, const std::string& effect, std::optional<double> timeout,
                const py::object& on_step, const py::object& on_done) {
  Request request{bucket,
                  noise,
                  refs,
                  text,
                  cos,
                  sin,
                  text_len,
                  generator,
                  effect,
                  timeout,
                  as_progress(on_step),
                  as_answer(on_done)};
  try {
    return batcher.submit(std::move(request));
  } catch (const QueueFull& error) {
    static const py::handle full = py::object(py::module_::import("clora._C").attr("QueueFull")).release();
    PyErr_SetString(full.ptr(), error.what());
    throw py::error_already_set();
  }
}

std::map<std::string, double> stats(const Batcher& batcher, int max_batch) {
  const Stats s = batcher.stats();
  const auto count = [](int64_t number) { return static_cast<double>(number); };
  const double steps = count(std::max<int64_t>(s.steps, 1));
  return {{"queued", count(s.queued)},
          {"running", count(s.running)},
          {"done", count(s.done)},
          {"cancelled", count(s.cancelled)},
          {"expired", count(s.expired)},
          {"failed", count(s.failed)},
          {"rejected", count(s.rejected)},
          {"steps", count(s.steps)},
          {"steps_per_second", s.busy_seconds > 0 ? count(s.steps) / s.busy_seconds : 0.0},
          {"busy_seconds", s.busy_seconds},
          {"batch_mean", count(s.samples) / steps},
          {"batch_fill", count(s.samples) / steps / max_batch},
          {"effects_last", count(s.effects_last)},
          {"effects_max", count(s.effects_max)},
          {"effects_mean", count(s.effects_sum) / steps}};
}

// Its end waits for a step that may need the GIL.
struct DeletedUnlocked {
  void operator()(Batcher* batcher) const {
    const py::gil_scoped_release no_gil;
    delete batcher;
  }
};

}  // namespace

void bind_batcher(py::module_& m) {
  py::register_exception<QueueFull>(m, "QueueFull");
  py::class_<Batcher, std::unique_ptr<Batcher, DeletedUnlocked>>(
      m, "Batcher", "Step-level continuous batching; `clora.inference.batching` is its typed side.")
      .def(py::init(torch::wrap_pybind_function([](const py::object& engine, const at::Tensor& sigmas,
                                                   const std::string& sampler, at::ScalarType dtype,
                                                   int max_batch, int max_queue) {
             return std::unique_ptr<Batcher, DeletedUnlocked>(
                 new Batcher(std::make_shared<PlainErrors>(as_engine(engine)), sigmas, sampler_named(sampler),
                             dtype, max_batch, max_queue));
           })),
           py::arg("engine"), py::arg("sigmas"), py::arg("sampler"), py::arg("dtype"), py::arg("max_batch"),
           py::arg("max_queue"))
      .def("submit", torch::wrap_pybind_function(submit), py::arg("bucket"), py::arg("noise_TC"),
           py::arg("refs_RC"), py::arg("text_MD"), py::arg("cos"), py::arg("sin"), py::arg("text_len"),
           py::arg("generator"), py::arg("effect"), py::arg("timeout"), py::arg("on_step"),
           py::arg("on_done"))
      .def("cancel", &Batcher::cancel, py::arg("ticket"))
      .def("stats",
           torch::wrap_pybind_function([](const Batcher& self) { return stats(self, self.max_batch()); }))
      .def(
          "close",
          [](Batcher& self, bool drain, std::optional<double> timeout) {
            const py::gil_scoped_release no_gil;
            self.close(drain, timeout);
          },
          py::arg("drain"), py::arg("timeout"));
}

}  // namespace clora
