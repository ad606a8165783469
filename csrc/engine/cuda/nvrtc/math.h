// NVRTC declares the functions of the math library.
#pragma once
