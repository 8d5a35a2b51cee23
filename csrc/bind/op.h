// Makes a Python function of an op from its problem's table of fields (core/fields.h) and its kernels, with an argument
// for each field. A call fills in the problem, checks its tensors, runs the op's own check for what the table does not
// say, and runs the kernel for the device of the tensors.
#pragma once

#include <array>
#include <functional>
#include <string>
#include <utility>

#include "bind/dispatch.h"
#include "core/aligned_buffer.h"
#include "core/fields.h"

namespace cpc::bind {

// Registers a function that binds the ops of a file. Files do this when the module is loaded, so there is no list of
// them.
class Ops {
 public:
  using Bind = void (*)(py::module_& module);
  explicit Ops(Bind bind) { all().push_back(bind); }

  static std::vector<Bind>& all() {
    static std::vector<Bind> registered;
    return registered;
  }
};

// --- Fields as arguments ---

template <class Field>
struct ArgumentOf;
template <auto... path>
struct ArgumentOf<TensorAt<path...>> {
  using type = OptionalTensor;
};
template <auto... path>
struct ArgumentOf<WorkspaceAt<path...>> {
  using type = OptionalTensor;
};
template <class Problem, class Field>
using ValueOf = std::decay_t<decltype(Field::in(std::declval<Problem&>()))>;

template <class Problem, class Field, class = void>
struct PythonArgument {
  using Value = ValueOf<Problem, Field>;
  // Enumerations come by the names that names_of(value) lists.
  using type = std::conditional_t<std::is_enum_v<Value>, std::string, Value>;
};
template <class Problem, class Field>
struct PythonArgument<Problem, Field, std::void_t<typename ArgumentOf<Field>::type>> : ArgumentOf<Field> {};
template <class Problem, class Field>
using PythonArgumentOf = typename PythonArgument<Problem, Field>::type;

// The enumerator of a name.
template <class Value>
Value by_name(const char* argument, const std::string& name) {
  std::string known;
  int i = 0;
  for (const char* other : names_of(Value{})) {
    if (name == other) return static_cast<Value>(i);
    known += (i++ ? ", " : "") + std::string(other);
  }
  throw std::invalid_argument(std::string(argument) + " must be one of " + known + ", got " + name);
}

// The tensors of a call, for the checks of device and overlap.
class Tensors {
 public:
  static constexpr size_t kMost = 32;

  void add(const char* name, Access access, const TensorArg& tensor) {
    if (first_ == nullptr) first_ = &tensor;
    if (access == Access::write) {
      written_[written_count_++] = {name, tensor};
    } else {
      read_[read_count_++] = {name, tensor};
    }
  }
  // See common_device for what it checks.
  DLDevice device() const { return common_device({read_, read_count_}, {written_, written_count_}); }
  // One of the tensors; its framework knows the stream.
  const TensorArg& any() const { return *first_; }

 private:
  Argument read_[kMost], written_[kMost];
  size_t read_count_ = 0, written_count_ = 0;
  const TensorArg* first_ = nullptr;
};

template <class Problem, auto... path>
void fill_in(const TensorAt<path...>& field, Problem& problem, const OptionalTensor& given, Tensors& tensors) {
  if (!given) {
    if (!field.optional) throw py::type_error(std::string(field.name) + " must be a tensor, got None");
    return;
  }
  if (field.optional && given->view.ndim == 0)  // It would count as absent.
    throw std::invalid_argument(std::string(field.name) + " must not be without dimensions");
  field.in(problem) = given->view;
  tensors.add(field.name, field.access, *given);
}
template <class Problem, auto... path>
void fill_in(const WorkspaceAt<path...>& field, Problem& problem, const OptionalTensor& given, Tensors& tensors) {
  if (!given) return;
  field.in(problem) = given->view;
  tensors.add(field.name, Access::write, *given);
}
template <class Problem, auto... path, class Value>
void fill_in(const ValueAt<path...>& field, Problem& problem, Value& given, Tensors&) {
  using Field = std::decay_t<decltype(field.in(problem))>;
  if constexpr (std::is_enum_v<Field>)
    field.in(problem) = by_name<Field>(field.name, given);
  else
    field.in(problem) = std::move(given);
}

// --- A call ---

// Whether all tensors may come without B, the leading dimension of their shapes in the table, which is then 1. Adding
// it in Python would take longer than the kernel of a small problem: one view per tensor.
enum class Batch : uint8_t { given, optional };

inline void lead_with_one(TensorView& view) {
  for (int d = view.ndim++; d > 0; --d) {
    view.shape[d] = view.shape[d - 1];
    view.strides[d] = view.strides[d - 1];
  }
  view.shape[0] = 1;
  view.strides[0] = view.ndim > 1 ? view.shape[1] * view.strides[1] : 1;
}

// Adds the batch dimension to the tensors of a problem whose first tensor has none.
template <class Problem, class... Fields>
void complete_batch(const Table<Problem, Fields...>& table, Problem& problem) {
  bool first = true, lacks = false;
  const auto look = [&](const auto& field) {
    if constexpr (std::is_base_of_v<TensorField, std::decay_t<decltype(field)>>) {
      TensorView& view = field.in(problem);
      const Shape::Form& form = field.shape.form(view.ndim);
      if (first) lacks = view.ndim == form.ndim - 1;
      first = false;
      if (lacks && view.ndim == form.ndim - 1 && form.symbols[0] == Shape::symbol_of('B', 0)) lead_with_one(view);
    }
  };
  std::apply([&](const auto&... field) { (look(field), ...); }, table.fields);
}

template <class Problem, class... Fields>
void check_fields(const Table<Problem, Fields...>& table, Problem& problem) {
  FieldCheck check;
  bool completed = table.complete == nullptr;
  const auto look = [&](const auto& field) {
    if constexpr (std::is_base_of_v<TensorField, std::decay_t<decltype(field)>>) {
      const TensorView& view = field.in(problem);
      if (!field.optional || view.ndim != 0) check.tensor(field, view);
      if (!completed) table.complete(problem, check.sizes);
      completed = true;
    }
  };
  std::apply([&](const auto&... field) { (look(field), ...); }, table.fields);
}

// Calls the op's own check(problem, where), if it has one.
template <class Problem>
void check_rest(const Problem& problem, Where where) {
  if constexpr (requires { check(problem, where); }) check(problem, where);
}

template <class Problem>
int64_t workspace_bytes_on(const Problem& problem, [[maybe_unused]] DLDevice device) {
#if defined(CPC_WITH_CUDA)
  if (on_cuda(device)) return on_device_of(device, [&] { return workspace_bytes(problem, where_is(device)); });
#endif
  return workspace_bytes(problem, where_is(device));
}

// Fills in a problem and checks everything but the size of its workspace.
template <class Problem, class... Fields, class... Given>
DLDevice take(const Table<Problem, Fields...>& table, Batch batch, Problem& problem, Tensors& tensors,
              Given&... given) {
  prepare_thread();
  [&]<size_t... i>(std::index_sequence<i...>) {
    (fill_in(std::get<i>(table.fields), problem, given, tensors), ...);
  }(std::index_sequence_for<Given...>());
  const DLDevice device = tensors.device();
  if (batch == Batch::optional) complete_batch(table, problem);
  check_fields(table, problem);
  check_rest(problem, where_is(device));
  return device;
}

template <class Problem, class... Fields, size_t... i>
void bind_workspace(py::module_& module, const char* name, const Table<Problem, Fields...>& table, Batch batch,
                    std::index_sequence<i...>) {
  module.def(
      name,
      [&table, batch](PythonArgumentOf<Problem, std::tuple_element_t<i, std::tuple<Fields...>>>... given) {
        Problem problem;
        Tensors tensors;
        return workspace_bytes_on(problem, take(table, batch, problem, tensors, given...));
      },
      py::arg(std::get<i>(table.fields).name)..., "Bytes that the problem's workspace must have.");
}

template <class Field>
constexpr bool is_workspace = false;
template <auto... path>
constexpr bool is_workspace<WorkspaceAt<path...>> = true;

// The binding provides workspaces on the host up to this size itself. Most calls need no more, and returning to Python
// for an allocation takes longer than the kernel of a small problem.
constexpr int64_t kOwnWorkspace = int64_t{4} << 20;

// Provides a workspace on the host where the caller left out a small one, and checks a workspace that is given. Returns
// the bytes that the caller must provide, or 0.
template <class Problem, class Field>
int64_t missing_workspace(const Field& field, Problem& problem, [[maybe_unused]] DLDevice device) {
  if constexpr (is_workspace<Field>) {
    TensorView& workspace = field.in(problem);
    const int64_t bytes = workspace_bytes_on(problem, device);
    if (workspace.ndim == 0 && bytes != 0) {
      if (on_cuda(device) || bytes > kOwnWorkspace) return bytes;
      thread_local AlignedBuffer own;
      workspace = {.data = own.reserve(bytes), .dtype = DType::u8, .ndim = 1, .shape = {bytes}, .strides = {1}};
    }
    FieldCheck::workspace(field.name, workspace, bytes);
  }
  return 0;
}

// Adds a function to the module, which `table` must outlive. Where the problem has a workspace, the caller may leave it
// out at first: the function returns 0 if it has run, or else the number of bytes that the workspace must have.
template <class Problem, class... Fields>
void op(py::module_& module, const char* name, const char* doc, const Table<Problem, Fields...>& table,
        std::type_identity_t<void (*)(const Problem&)> cpu,
        std::type_identity_t<void (*)(const Problem&, void* stream)> cuda, Batch batch = Batch::given) {
  static_assert(sizeof...(Fields) <= Tensors::kMost);
  const auto ask_for_workspace = [&]<size_t... i>(std::index_sequence<i...>) {
    const auto ask = [&]<size_t at>(std::integral_constant<size_t, at>) {
      using Field = std::tuple_element_t<at, std::tuple<Fields...>>;
      if constexpr (is_workspace<Field>)
        bind_workspace(module, std::get<at>(table.fields).ask, table, batch, std::make_index_sequence<at>());
    };
    (ask(std::integral_constant<size_t, i>()), ...);
  };
  ask_for_workspace(std::index_sequence_for<Fields...>());
  const auto call = [&table, cpu, cuda, batch](PythonArgumentOf<Problem, Fields>... given) {
    Problem problem;
    Tensors tensors;
    const DLDevice device = take(table, batch, problem, tensors, given...);
    if constexpr ((is_workspace<Fields> || ...)) {
      const int64_t missing = std::apply(
          [&](const auto&... field) { return (missing_workspace(field, problem, device) + ...); }, table.fields);
      if (missing == 0) run(problem, tensors.any(), cpu, cuda);
      return missing;
    } else {
      run(problem, tensors.any(), cpu, cuda);
    }
  };
  std::apply([&](const auto&... field) { module.def(name, call, py::arg(field.name)..., doc); }, table.fields);
}

}  // namespace cpc::bind
