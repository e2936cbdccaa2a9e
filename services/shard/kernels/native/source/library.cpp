// The functions that Python calls. `binding.py` has their signatures.
#include <memory>

#include "step.h"

#if defined(FERMATA_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using namespace fermata;

template <class Element>
void pack_panels(const Element* source, const int32_t* rows, int panels, int inner, int padded, Element* target) {
  constexpr int group = sizeof(Element) == 1 ? kQuad : kPair<Element>;
  for (int panel = 0; panel < panels; ++panel)
    for (int column = 0; column < kPanel; ++column) {
      const int row = rows[panel * kPanel + column];
      Element* const lines = target + static_cast<size_t>(panel) * padded * kPanel + column * group;
      for (int k = 0; k < padded; ++k)
        lines[static_cast<size_t>(k / group) * kPanel * group + k % group] =
            row >= 0 && k < inner ? source[static_cast<size_t>(row) * inner + k] : Element{};
    }
}

}  // namespace

extern "C" {

// Asks the system for what the instruction set needs. Returns 0 where it is refused.
int32_t fermata_prepare() {
#if defined(FERMATA_AMX)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2): ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return 1;
#endif
}

// Packs rows of a matrix [*, inner] into panels of 32; a row of -1 is zeros. `kind` as in `Model.weight_kind`.
void fermata_pack(int32_t kind, const void* source, const int32_t* rows, int32_t panels, int32_t inner, int32_t padded,
                  void* target) {
  if (kind == 0)
    pack_panels(static_cast<const float*>(source), rows, panels, inner, padded, static_cast<float*>(target));
  else if (kind == 1)
    pack_panels(static_cast<const BFloat16*>(source), rows, panels, inner, padded, static_cast<BFloat16*>(target));
  else
    pack_panels(static_cast<const int8_t*>(source), rows, panels, inner, padded, static_cast<int8_t*>(target));
}

// A stepper for a model that stays where it is, with so many compute threads.
void* fermata_create(const Model* model, int32_t threads) {
  Stepper* stepper = nullptr;
  if (model->weight_kind == 0)
    stepper = new TypedStepper<float>(*model, threads);
  else if (model->weight_kind == 1)
    stepper = new TypedStepper<BFloat16>(*model, threads);
  else
    stepper = new TypedStepper<int8_t>(*model, threads);
  return stepper;
}

// Computes a step. Returns how many tokens could not be.
int32_t fermata_forward(void* stepper, const Step* step) { return static_cast<Stepper*>(stepper)->forward(*step); }

void fermata_destroy(void* stepper) { delete static_cast<Stepper*>(stepper); }
}
