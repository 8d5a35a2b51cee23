// The fields of a problem as a table. The arguments of its binding, the checks before a kernel touches memory, and
// their error messages all follow from it. For each tensor the table has its name, access, element type, shape in
// symbols and layout; for each other value its name.
//
//   constexpr auto kSampling = fields_of<Sampling>(
//       reads<&Sampling::params>("params", Type::floating, "B P H W"),
//       writes<&Sampling::images>("images", Type::u8, "B C H W", Layout::dense),
//       value<&Sampling::temperature>("temperature"));
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "core/tensor_view.h"

namespace cpc {

enum class Access : uint8_t { read, write };

// The device that computes. On CUDA a check may not look at the values of tensors, as this would stall the stream.
enum class Where : uint8_t { host, cuda };

// True where the host can access the values of tensors; in the emulation of CUDA it can.
constexpr bool readable([[maybe_unused]] Where where) {
#if defined(CPC_CUDA_EMULATION)
  return true;
#else
  return where == Where::host;
#endif
}

// Element types that a tensor may have.
enum class Type : uint8_t {
  u8,
  boolean,
  i64,
  f32,
  floating,
  u8_or_floating,
  f32_or_f64,
  same,  // That of the first floating tensor of the table.
  sums,  // The type that sums of that one are computed in: double for double, else float.
};

enum class Layout : uint8_t {
  any,    // Strides of every kind.
  dense,  // In the order of the dimensions.
  dense_in_any_order,
  channels_last,       // Dense, with dimension 1 innermost.
  channels_innermost,  // Dimension 1 has stride 1.
};

// A shape in symbols: "B C H W". The first tensor with a symbol sets its size, and all others must have the same; a
// number stands for itself. Two forms of different length may be allowed: "kh kw | O C kh kw".
class Shape {
 public:
  // One or two characters, or a number below 100.
  using Symbol = uint16_t;
  struct Form {
    int ndim = 0;
    Symbol symbols[TensorView::kMaxDims] = {};
  };

  constexpr Shape(const char* text) {
    for (const char* c = text; *c != 0; ++c) {
      if (*c == '|') ++count_;
      if (*c == ' ' || *c == '|') continue;
      const char second = c[1] != 0 && c[1] != ' ' ? *++c : '\0';
      Form& form = forms_[count_ - 1];
      form.symbols[form.ndim++] = symbol_of(second ? c[-1] : *c, second);
    }
  }

  // The form of `ndim` dimensions, or the last form where there is none.
  const Form& form(int ndim) const { return forms_[count_ == 2 && forms_[0].ndim == ndim ? 0 : count_ - 1]; }
  const Form* begin() const { return forms_; }
  const Form* end() const { return forms_ + count_; }

  static constexpr Symbol symbol_of(char first, char second) {
    return static_cast<Symbol>(static_cast<unsigned char>(first) | static_cast<unsigned char>(second) << 8);
  }

 private:
  int count_ = 1;
  Form forms_[2] = {};
};

// The sizes of those symbols of a problem that are known so far.
class Sizes {
 public:
  // Null where the size is not known.
  const int64_t* find(Shape::Symbol symbol) const;
  void set(Shape::Symbol symbol, int64_t size);
  void set(const char* symbol, int64_t size) { set(Shape::symbol_of(symbol[0], symbol[1]), size); }

 private:
  static constexpr int kMost = 16;
  int count_ = 0;
  Shape::Symbol symbols_[kMost];
  int64_t sizes_[kMost];
};

struct TensorField {
  const char* name;
  Access access;
  bool optional;
  Type type;
  Shape shape;
  Layout layout;
};

// The place of a field in a problem: a member, or a member of a member.
template <auto... path>
struct Place {
  template <class Problem>
  static constexpr auto& in(Problem& problem) {
    return (problem.*....*path);
  }
};

template <auto... path>
struct TensorAt : TensorField, Place<path...> {};

template <auto... path>
struct ValueAt : Place<path...> {
  const char* name;
};

// Scratch memory that the op's caller provides: workspace_bytes(problem) contiguous bytes, aligned to 64. In Python,
// the function named `ask` returns that number from the arguments that come before the workspace.
template <auto... path>
struct WorkspaceAt : Place<path...> {
  const char *name, *ask;
};

template <auto... path>
constexpr TensorAt<path...> reads(const char* name, Type type, Shape shape, Layout layout = Layout::any) {
  return {{name, Access::read, false, type, shape, layout}, {}};
}
template <auto... path>
constexpr TensorAt<path...> may_read(const char* name, Type type, Shape shape, Layout layout = Layout::any) {
  return {{name, Access::read, true, type, shape, layout}, {}};
}
template <auto... path>
constexpr TensorAt<path...> writes(const char* name, Type type, Shape shape, Layout layout = Layout::any) {
  return {{name, Access::write, false, type, shape, layout}, {}};
}
template <auto... path>
constexpr TensorAt<path...> may_write(const char* name, Type type, Shape shape, Layout layout = Layout::any) {
  return {{name, Access::write, true, type, shape, layout}, {}};
}
template <auto... path>
constexpr ValueAt<path...> value(const char* name) {
  return {{}, name};
}
template <auto... path>
constexpr WorkspaceAt<path...> workspace(const char* name, const char* ask) {
  return {{}, name, ask};
}

template <class P, class... Fields>
struct Table {
  using Problem = P;
  // Runs once the first tensor has been checked. Sets the sizes that the other fields depend on, and throws where the
  // problem's values make no sense.
  void (*complete)(Problem& problem, Sizes& sizes);
  std::tuple<Fields...> fields;
};

template <class Field>
constexpr std::tuple<Field> as_tuple(Field field) {
  return {field};
}
template <class... Fields>
constexpr std::tuple<Fields...> as_tuple(std::tuple<Fields...> fields) {
  return fields;
}

// Makes a table of fields, and of tuples of fields that several tables share.
template <class Problem, class... Parts>
constexpr auto fields_of(void (*complete)(Problem&, Sizes&), Parts... parts) {
  return [&]<class... Fields>(std::tuple<Fields...> fields) {
    return Table<Problem, Fields...>{complete, fields};
  }(std::tuple_cat(as_tuple(parts)...));
}
template <class Problem, class... Parts>
constexpr auto fields_of(Parts... parts) {
  return fields_of<Problem>(static_cast<void (*)(Problem&, Sizes&)>(nullptr), parts...);
}

// Checks the tensors of a problem, in the table's order. The functions throw std::invalid_argument with the field's
// name, what was expected and what came.
class FieldCheck {
 public:
  void tensor(const TensorField& field, const TensorView& view);
  static void workspace(const char* name, const TensorView& view, int64_t bytes);

  Sizes sizes;

 private:
  void require_type(const TensorField& field, DType dtype);
  void require_shape(const TensorField& field, const TensorView& view);

  const char* floating_name_ = nullptr;
  DType floating_ = DType::f32;
};

}  // namespace cpc
