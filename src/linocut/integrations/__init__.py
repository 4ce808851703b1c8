"""linocut among other programs: conversion from and to their formats, the hub, and a quantizer for diffusers."""
