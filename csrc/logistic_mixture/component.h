// A pixel's mass under one component and its gradient: arithmetic that the CPU and CUDA kernels share, written once for
// a register of pixels and for a single one.
//
// With m and h as in logistic_mixture.h, u = e^-|m| and S(h) = sinh(h) / h, the difference of two sigmoids is
//   sinh(h) / (cosh(m) + cosh(h)) = 2 h u * S(h) / ((1 + u)^2 + 4 u sinh^2(h / 2)),
// and the density at the centre times the bin's width is its limit for a narrow bin, S = 1 and sinh = 0. So there is no
// cancellation, and as h is at most e^7 / 255, the quotient on the right is between 1/160 and 10. A component's joint
// mass is kept as e^exponent times such quotients, so that no logarithm is needed before the sum over the components.
#pragma once

#include <limits>

#include "logistic_mixture/logistic_mixture.h"

namespace cpc::logistic_mixture {

// Math provides Real, the type to compute in, a float or a register of them, and the functions abs(x), exp(x),
// exp_below_zero(x) for x that are not above 0, and divide(a, b).

// Calls body(c) for c in [0, n), unrolled, so that arrays indexed by colour stay in registers.
template <int n, class Body>
CPC_HOST_DEVICE inline void unrolled(const Body& body) {
  if constexpr (n > 1) unrolled<n - 1>(body);
  body(n - 1);
}

// A pixel's value of one colour.
template <class Real>
struct Value {
  Real x;
  Real sign;      // -1 at 255, where the open bin is mirrored; else 1.
  Real start;     // sign * x for 1 to 254; for 0 and 255 the bin's inner end, mirrored at 255.
  Real interior;  // 1 for 1 to 254; else 0.
};

// `v` is in 0..255.
template <class Real>
CPC_HOST_DEVICE inline Value<Real> value_of(Real v) {
  const Real zero = Real{}, one = zero + 1.f;
  const Real x = (v + v - 255.f) * static_cast<float>(kHalfBin), open = zero - 254.f * static_cast<float>(kHalfBin);
  const auto is_first = v == 0.f, is_last = v == 255.f;
  return {x, is_last ? -one : one, is_first ? open : is_last ? open : x, is_first ? zero : is_last ? zero : one};
}

// tanh and its slope. The absolute error is some units in the last place of 1.
template <class Real>
struct Coefficient {
  Real value, slope;
};

template <class Math, class Real>
CPC_HOST_DEVICE inline Coefficient<Real> coefficient_of(Real c) {
  const Real value = 1.f - Math::divide(Real{} + 2.f, 1.f + Math::exp(c + c));
  return {value, 1.f - value * value};
}

// One colour's mass under one component.
template <class Math>
struct Mass {
  using Real = typename Math::Real;
  // t is m for values 1 to 254, and the argument of the sigmoid for 0 and 255; u = e^-|t|.
  Real t, u, half, inverse_scale;
  Real numerator, denominator;  // Of the quotient: S and its divisor, or their limits.
  Real spread;                  // 4 sinh^2(half / 2) where the mass is a difference of sigmoids, else 0.
  Real exponent;

  Mass() = default;
  CPC_HOST_DEVICE Mass(const Value<Real>& value, Real mean, Real log_scale) {
    constexpr float kLogBin = -4.848116f;  // log(2 / 255)
    constexpr float kLeast = static_cast<float>(kLeastLogScale);
    const Real zero = Real{}, one = zero + 1.f;
    const Real s = log_scale < kLeast ? zero + kLeast : log_scale;
    inverse_scale = Math::exp(-s);
    half = inverse_scale * static_cast<float>(kHalfBin);
    t = (value.start - value.sign * mean) * inverse_scale;
    const Real distance = Math::abs(t);
    u = Math::exp_below_zero(-distance);
    // sinh(r) / r and cosh(r) at r = half / 2, as polynomials in half^2 <= 18.5.
    const Real z = half * half;
    const Real sinh = ((((2.66675514e-11f * z + 1.07197305e-08f) * z + 3.10061267e-06f) * z + 5.20831631e-04f) * z +
                       4.16666692e-02f) *
                          z +
                      1.f;
    const Real cosh = ((((2.96942465e-10f * z + 9.63372231e-08f) * z + 2.17061487e-05f) * z + 2.60414849e-03f) * z +
                       1.25000024e-01f) *
                          z +
                      1.f;
    const Real ratio = sinh * cosh, square = z * sinh * sinh;
    const Real narrow = (1.f + u) * (1.f + value.interior * u), bin = narrow + u * square;
    const auto is_bin = half * ratio * u * value.interior > bin * static_cast<float>(kLeastMass / 2);
    numerator = is_bin ? ratio : one;
    denominator = is_bin ? bin : narrow;
    spread = is_bin ? square : zero;
    // -|t| plus the logarithm of the bin's width in scales for values 1 to 254; min(t, 0) for 0 and 255.
    exponent = value.interior * (kLogBin - s) - distance + (0.5f - 0.5f * value.interior) * (t + distance);
  }

  // The mass's quotient, and the slopes of the mass's logarithm in the mean and the log-scale.
  struct Slopes {
    Real quotient, mean, log_scale;
  };
  CPC_HOST_DEVICE Slopes slopes(const Value<Real>& value, Real raw_log_scale) const {
    const Real zero = Real{}, one = zero + 1.f;
    const auto below = t < 0.f;
    const Real inverse = Math::divide(one, denominator * numerator), inverse_denominator = inverse * numerator;
    const Real between = (1.f - u) * (1.f + u);
    const Real slope = (value.interior == 0.f ? (below ? one : u) : (below ? between : -between)) * inverse_denominator;
    // h coth(h) - h * mass for a difference of sigmoids, 1 at the limit of a narrow bin.
    const Real of_half = (1.f + 0.5f * spread) * inverse * denominator -
                         (spread > 0.f ? 2.f * half * half * u * numerator * inverse_denominator : zero);
    const Real log_scale = -t * slope - value.interior * of_half;
    return {numerator * inverse_denominator, -inverse_scale * value.sign * slope,
            raw_log_scale < static_cast<float>(kLeastLogScale) ? zero : log_scale};
  }
};

// Accumulates log(sum of e^exponent * factor) as peak + log(total), one term after another. A term whose exponent is
// -inf adds nothing, even if it is the first, as the peak is finite.
template <class Math>
struct LogSum {
  using Real = typename Math::Real;
  Real peak = Real{} - std::numeric_limits<float>::max(), total = Real{};

  CPC_HOST_DEVICE void add(Real exponent, Real factor) {
    const Real above = exponent - peak, e = Math::exp_below_zero(-Math::abs(above));
    total = above > 0.f ? total * e + factor : total + e * factor;
    peak = above > 0.f ? exponent : peak;
  }
};

// A pixel under all components. `params(p)` gives its parameter p.
template <class Math, int Channels>
struct Pixel {
  using Real = typename Math::Real;
  Value<Real> values[Channels];

  // The index of component k's parameter of a colour: means, log-scales and coefficients are kinds 0, 1 and 2.
  CPC_HOST_DEVICE static int64_t at(int64_t components, int64_t k, int color, int kind) {
    return components * (1 + color * (Channels == 3 ? 3 : 2) + kind) + k;
  }

  struct Masses {
    Coefficient<Real> coefficients[Channels];
    Mass<Math> of_color[Channels];
    Real exponent;  // Of the joint mass, plus logit - largest logit.
  };
  template <class Params>
  CPC_HOST_DEVICE Masses masses(const Params& params, int64_t components, int64_t k, Real largest_logit) const {
    Real means[Channels];
    unrolled<Channels>([&](int c) { means[c] = params(at(components, k, c, 0)); });
    Masses m;
    if constexpr (Channels == 3) {
      unrolled<3>([&](int c) { m.coefficients[c] = coefficient_of<Math>(params(at(components, k, c, 2))); });
      means[1] += m.coefficients[0].value * values[0].x;
      means[2] += m.coefficients[1].value * values[0].x + m.coefficients[2].value * values[1].x;
    }
    m.exponent = params(k) - largest_logit;
    unrolled<Channels>([&](int c) {
      m.of_color[c] = Mass<Math>(values[c], means[c], params(at(components, k, c, 1)));
      m.exponent += m.of_color[c].exponent;
    });
    return m;
  }

  template <class Params>
  CPC_HOST_DEVICE LogSum<Math> logits(const Params& params, int64_t components) const {
    LogSum<Math> sum;
    for (int64_t k = 0; k < components; ++k) sum.add(params(k), Real{} + 1.f);
    return sum;
  }

  // The sum over components of e^(logit - largest logit) times the joint mass.
  template <class Params>
  CPC_HOST_DEVICE LogSum<Math> joint(const Params& params, int64_t components, Real largest_logit) const {
    LogSum<Math> sum;
    for (int64_t k = 0; k < components; ++k) {
      const Masses m = masses(params, components, k, largest_logit);
      Real numerator = Real{} + 1.f, denominator = Real{} + 1.f;
      unrolled<Channels>([&](int c) {
        numerator *= m.of_color[c].numerator;
        denominator *= m.of_color[c].denominator;
      });
      sum.add(m.exponent, Math::divide(numerator, denominator));
    }
    return sum;
  }

  // Calls write(p, g) for every parameter p, where g is the gradient in p of the pixel's nats, times `scale`, and `sum`
  // is joint(). Parameters may be overwritten by their gradients.
  template <class Params, class Write>
  CPC_HOST_DEVICE void differentiate(const Params& params, int64_t components, const LogSum<Math>& sum, Real scale,
                                     const Write& write) const {
    const LogSum<Math> prior = logits(params, components);
    const Real per_prior = Math::divide(scale, prior.total), per_joint = Math::divide(scale, sum.total);
    for (int64_t k = 0; k < components; ++k) {
      const Masses m = masses(params, components, k, prior.peak);
      typename Mass<Math>::Slopes slopes[Channels];
      // The component's posterior probability, times the scale.
      Real share = per_joint * Math::exp(m.exponent - sum.peak);
      unrolled<Channels>([&](int c) {
        slopes[c] = m.of_color[c].slopes(values[c], params(at(components, k, c, 1)));
        share *= slopes[c].quotient;
      });
      write(k, per_prior * Math::exp_below_zero(params(k) - prior.peak) - share);
      unrolled<Channels>([&](int c) {
        write(at(components, k, c, 0), -share * slopes[c].mean);
        write(at(components, k, c, 1), -share * slopes[c].log_scale);
      });
      if constexpr (Channels == 3) {
        const Real green = -share * slopes[1].mean, blue = -share * slopes[2].mean;
        write(at(components, k, 0, 2), green * values[0].x * m.coefficients[0].slope);
        write(at(components, k, 1, 2), blue * values[0].x * m.coefficients[1].slope);
        write(at(components, k, 2, 2), blue * values[1].x * m.coefficients[2].slope);
      }
    }
  }
};

}  // namespace cpc::logistic_mixture
