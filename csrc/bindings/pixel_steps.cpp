// Binds networks that are run pixel by pixel; see csrc/pixel_steps/pixel_steps.h. On the CPU only: on CUDA a graph of
// tensor operations does the same.
#include "pixel_steps/pixel_steps.h"

#include <tuple>
#include <utility>

#include "bindings/dispatch.h"
#include "bindings/ops.h"

namespace cpc::bindings {
namespace {

using SourceArg = std::tuple<TensorArg, int64_t, std::vector<std::pair<int64_t, int64_t>>>;
// Level, sources, weight, bias, image_bias, residual, raw, elu, output_scale, offset.
using StepArg = std::tuple<int64_t, std::vector<SourceArg>, TensorArg, TensorArg, OptionalTensor, OptionalTensor,
                           OptionalTensor, OptionalTensor, int64_t, std::pair<int64_t, int64_t>>;

// A network, with the tensors that it reads and writes kept alive.
class PixelSteps {
 public:
  PixelSteps(const py::list& steps, int64_t batch, int64_t height, int64_t width) : tensors_(steps.attr("copy")()) {
    network_.batch = batch;
    network_.height = height;
    network_.width = width;
    for (const py::handle step : steps) add(step.cast<StepArg>());
    if (!network_.steps.empty()) network_.dtype = network_.steps.front().weight.dtype;
    pixel_steps::check(network_);
    pixel_steps::cpu::pack(network_);
  }

  void run_pixel(int64_t row, int64_t col) const { run({.network = network_, .row = row, .col = col}); }
  void run_row(int64_t row) const { run({.network = network_, .row = row, .whole_row = true}); }

 private:
  static void run(const pixel_steps::Place& place) {
    pixel_steps::check(place);
    const py::gil_scoped_release unlocked;
    pixel_steps::cpu::run(place);
  }

  void add(const StepArg& arg) {
    const auto& [level, sources, weight, bias, image_bias, residual, raw, elu, output_scale, offset] = arg;
    std::vector<const TensorArg*> read = {&weight, &bias, pointer(image_bias), pointer(residual)}, written;
    for (const SourceArg& source : sources) read.push_back(&std::get<0>(source));
    for (const OptionalTensor* each : {&raw, &elu})
      if (*each) written.push_back(&**each);
    if (written.empty()) throw std::invalid_argument("a step must have raw or elu to write to");
    if (common_device(read, written).device_type != kDLCPU) throw std::invalid_argument("tensors must be on the CPU");
    pixel_steps::Step step{.level = level,
                           .sources = {},
                           .weight = weight.view,
                           .bias = bias.view,
                           .image_bias = view(image_bias),
                           .residual = view(residual),
                           .raw = view(raw),
                           .elu = view(elu),
                           .output_scale = output_scale,
                           .row_offset = offset.first,
                           .col_offset = offset.second,
                           .packed = nullptr};
    for (const auto& [map, scale, taps] : sources) {
      step.sources.push_back({map.view, scale, {}});
      for (const auto& [dy, dx] : taps) step.sources.back().taps.push_back({dy, dx});
    }
    network_.steps.push_back(std::move(step));
  }

  py::object tensors_;
  pixel_steps::Network network_;
};

}  // namespace

void bind_pixel_steps(py::module_& module) {
  py::class_<PixelSteps>(module, "PixelSteps", "A network that is run a pixel or a row at a time.")
      .def(py::init<const py::list&, int64_t, int64_t, int64_t>(), py::arg("steps"), py::arg("batch"),
           py::arg("height"), py::arg("width"))
      .def("run_pixel", &PixelSteps::run_pixel, py::arg("row"), py::arg("col"), "All steps due at a pixel.")
      .def("run_row", &PixelSteps::run_row, py::arg("row"), "All steps due in a row, each at all of its pixels.");
}

}  // namespace cpc::bindings
