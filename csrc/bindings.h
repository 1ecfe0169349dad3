// What the parts of the Python module share.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>

#include "engine.h"

namespace clora {

// An object that threads without the GIL may hold and drop.
std::shared_ptr<py::object> shared_object(py::object object);

// The tensor that a callable returned; raises TypeError for anything else.
at::Tensor as_tensor(const py::object& result, const char* what);

// An `AotiEngine`, or any callable, called with the GIL.
std::shared_ptr<Engine> as_engine(const py::object& engine);

void bind_batcher(py::module_& m);

}  // namespace clora
