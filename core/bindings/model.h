// Weights and models made of what Python hands over, with the arrays they borrow.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "onebit/model.h"
#include "onebit/types.h"

namespace onebit::bindings {

namespace nb = nanobind;

// A PackedMatrix together with the arrays it borrows.
struct PackedArrays {
  PackedMatrix matrix;
  nb::ndarray<nb::ro, nb::device::cpu> data;
  nb::ndarray<nb::ro, nb::device::cpu> scale;
};

PackedArrays make_packed(const std::string& encoding, std::int64_t n, std::int64_t k, nb::handle data,
                         nb::handle scale);

// A model together with the arrays it borrows.
struct OwnedModel {
  std::vector<nb::ndarray<nb::ro, nb::device::cpu>> owners;
  std::unique_ptr<onebit::Model> model;
};

// config: an onebit.config.ModelConfig; tensors by canonical name. Checks all of it.
OwnedModel make_model(nb::handle config, nb::dict tensors, nb::handle inv_freq, const std::string& isa, int threads,
                      bool int4_shortlist, nb::list adapters);

}  // namespace onebit::bindings
