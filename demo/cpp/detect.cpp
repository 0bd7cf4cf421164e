// SPDX-License-Identifier: Apache-2.0
// Detects objects with a TorchScript file of tools/export_model.py; see docs/deployment.md.
//
//   detect model.ts image.ppm LIBRARY...
//
// The libraries are loaded in their order; the last one has torchvision's operators.
// The image is a binary PPM file (RGB, 8 bits) that has the size the model wants already; the
// channels are passed in the order RGB. It prints a line for each object: its class, its score and
// its corners in pixels.
#include <dlfcn.h>
#include <torch/script.h>

#include <fstream>
#include <iostream>
#include <string>

torch::Tensor read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string format;
  int64_t width = 0, height = 0, maximum = 0;
  file >> format >> width >> height >> maximum;
  file.get();
  TORCH_CHECK(format == "P6" && maximum == 255, path, ": not a PPM file of 8 bits");
  auto pixels = torch::empty({height, width, 3}, torch::kUInt8);
  file.read(reinterpret_cast<char*>(pixels.data_ptr<uint8_t>()), pixels.numel());
  TORCH_CHECK(file.gcount() == pixels.numel(), path, ": the file is cut short");
  return pixels.permute({2, 0, 1}).to(torch::kFloat32).contiguous();
}

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: detect MODEL IMAGE LIBRARY...\n";
    return 2;
  }
  try {
    // Registers RoIAlign and non-maximum suppression; nothing else of torchvision is used.
    for (int i = 3; i < argc; i++) {
      TORCH_CHECK(dlopen(argv[i], RTLD_NOW | RTLD_GLOBAL), dlerror());
    }
    auto model = torch::jit::load(argv[1]);
    model.eval();
    torch::NoGradGuard no_grad;
    auto found = model.forward({read_ppm(argv[2])}).toTuple()->elements();
    auto boxes = found[0].toTensor(), classes = found[1].toTensor(), scores = found[2].toTensor();
    for (int64_t i = 0; i < scores.size(0); i++) {
      std::cout << classes[i].item<int64_t>() << " " << scores[i].item<float>();
      for (int64_t j = 0; j < 4; j++) std::cout << " " << boxes[i][j].item<float>();
      std::cout << "\n";
    }
  } catch (const c10::Error& e) {
    std::cerr << "error: " << e.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& e) {
    std::cerr << "error: " << e.what() << "\n";
    return 1;
  }
}
