"""What tests of several areas share: servers, tiny models, fakes of clocks and transports."""
