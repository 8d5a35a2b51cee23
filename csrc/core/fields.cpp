// See fields.h. Every call pays for the checks, so messages are built only when a check fails.
#include "core/fields.h"

#include "core/require.h"

namespace cpc {
namespace {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::u8: return "uint8";
    case DType::boolean: return "bool";
    case DType::i32: return "int32";
    case DType::i64: return "int64";
    case DType::f16: return "float16";
    case DType::bf16: return "bfloat16";
    case DType::f32: return "float32";
    case DType::f64: return "float64";
  }
  return "";
}

bool is_number(Shape::Symbol symbol) { return (symbol & 0xff) >= '0' && (symbol & 0xff) <= '9'; }

std::string text_of(Shape::Symbol symbol) {
  const char second = static_cast<char>(symbol >> 8);
  return std::string(1, static_cast<char>(symbol & 0xff)) + (second ? std::string(1, second) : "");
}

int64_t number_of(Shape::Symbol symbol) {
  const int first = (symbol & 0xff) - '0', second = symbol >> 8;
  return second ? 10 * first + second - '0' : first;
}

// [2, 3, S], where B and M are known to be 2 and 3.
std::string text_of(const Shape& shape, const Sizes& sizes) {
  std::string text;
  for (const Shape::Form& form : shape) {
    text += text.empty() ? "[" : " or [";
    for (int d = 0; d < form.ndim; ++d) {
      const int64_t* const size = sizes.find(form.symbols[d]);
      text += (d ? ", " : "") + (size ? std::to_string(*size) : text_of(form.symbols[d]));
    }
    text += "]";
  }
  return text;
}

bool is_dense_in_order(const TensorView& view) {
  int64_t expected = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    if (view.shape[d] != 1 && view.strides[d] != expected) return false;
    expected *= view.shape[d];
  }
  return true;
}

// bind/arguments.cpp has made sure that no two elements share memory.
bool fills_its_memory(const TensorView& view) {
  int64_t last = 0;
  for (int d = 0; d < view.ndim; ++d) last += (view.shape[d] - 1) * view.strides[d];
  return last == view.numel() - 1;
}

}  // namespace

const int64_t* Sizes::find(Shape::Symbol symbol) const {
  for (int i = 0; i < count_; ++i)
    if (symbols_[i] == symbol) return sizes_ + i;
  return nullptr;
}

void Sizes::set(Shape::Symbol symbol, int64_t size) {
  require(count_ < kMost, "a table of fields has too many symbols");
  symbols_[count_] = symbol;
  sizes_[count_++] = size;
}

void FieldCheck::require_type(const TensorField& field, DType dtype) {
  const auto expect = [&](bool holds, const char* expected) {
    if (!holds)
      throw std::invalid_argument(std::string(field.name) + " must be " + expected + ", got " + name_of(dtype));
  };
  const DType sums = floating_ == DType::f64 ? DType::f64 : DType::f32;
  switch (field.type) {
    case Type::u8: return expect(dtype == DType::u8, "uint8");
    case Type::boolean: return expect(dtype == DType::boolean, "bool");
    case Type::i64: return expect(dtype == DType::i64, "int64");
    case Type::f32: return expect(dtype == DType::f32, "float32");
    case Type::f32_or_f64: return expect(dtype == DType::f32 || dtype == DType::f64, "float32 or float64");
    case Type::u8_or_floating: return expect(dtype == DType::u8 || is_floating(dtype), "uint8 or floating");
    case Type::floating:
      expect(is_floating(dtype), "floating");
      if (floating_name_ != nullptr) return;
      floating_name_ = field.name;
      floating_ = dtype;
      return;
    case Type::same:
      if (dtype != floating_)
        expect(false, (std::string(name_of(floating_)) + " as " + floating_name_ + " is").c_str());
      return;
    case Type::sums: return expect(dtype == sums, name_of(sums));
  }
}

void FieldCheck::require_shape(const TensorField& field, const TensorView& view) {
  const Shape::Form& form = field.shape.form(view.ndim);
  bool holds = view.ndim == form.ndim;
  for (int d = 0; holds && d < form.ndim; ++d) {
    const Shape::Symbol symbol = form.symbols[d];
    if (is_number(symbol))
      holds = view.shape[d] == number_of(symbol);
    else if (const int64_t* const size = sizes.find(symbol))
      holds = view.shape[d] == *size;
    else
      sizes.set(symbol, view.shape[d]);
  }
  if (!holds)
    throw std::invalid_argument(std::string(field.name) + " must be " + text_of(field.shape, sizes) + ", got " +
                                shape_of(view));
}

void FieldCheck::tensor(const TensorField& field, const TensorView& view) {
  require_shape(field, view);
  require_type(field, view.dtype);
  const auto require_layout = [&](bool holds, const char* expected) {
    if (!holds && view.numel() != 0) throw std::invalid_argument(std::string(field.name) + " must " + expected);
  };
  switch (field.layout) {
    case Layout::any: return;
    case Layout::dense: return require_layout(is_dense_in_order(view), "be dense");
    case Layout::dense_in_any_order: return require_layout(fills_its_memory(view), "be dense");
    case Layout::channels_last: return require_layout(is_dense(view, {0, 2, 3, 1}), "be dense, channels innermost");
    case Layout::channels_innermost:
      return require_layout(view.strides[1] == 1 || view.shape[1] == 1, "have its channels innermost");
  }
}

void FieldCheck::workspace(const char* name, const TensorView& view, int64_t bytes) {
  const bool in_a_row = view.ndim == 1 && (view.shape[0] <= 1 || view.strides[0] == 1);
  if (bytes == 0 && view.ndim == 0) return;
  if (view.dtype != DType::u8 || !in_a_row || view.shape[0] < bytes ||
      (bytes > 0 && reinterpret_cast<uintptr_t>(view.data) % 64 != 0))
    throw std::invalid_argument(std::string(name) + " must be " + std::to_string(bytes) +
                                " bytes of dense uint8, aligned to 64 bytes");
}

}  // namespace cpc
